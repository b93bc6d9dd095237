"""One run is one YAML file, read strictly into frozen dataclasses.

The dataclasses are the schema: a field's type, rule and doc are all that reading, overriding and error
messages go by. A new setting is one more field.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from nni_jackpot.criteria import CRITERIA
from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.models import model_names, weights_names
from nni_jackpot.experiment.models.initial import INITS
from nni_jackpot.files import replace_file
from nni_jackpot.recipe import RECIPES
from nni_jackpot.supermask import METHODS

# -- the schema


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must fulfil, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def _at_least(low: int) -> Rule:
    return Rule(f">= {low}", lambda value: value >= low)


def _one_of(*choices: str) -> Rule:
    return Rule("out of " + ", ".join(choices), lambda value: value in choices)


_ANY = Rule("", lambda value: True)
_POSITIVE = Rule("> 0", lambda value: value > 0)
_NOT_EMPTY = Rule("that is not empty", lambda value: len(value) > 0)
_BELOW_ONE = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)
_PROGRESS = Rule(">= 0 and <= 1", lambda value: 0 <= value <= 1)
_SHARE = Rule("> 0 and <= 1", lambda value: 0 < value <= 1)
_SEED = Rule(">= 0 and < 2**32", lambda value: 0 <= value < 2**32)
_DEVICE = Rule(
    "out of auto, cpu, cuda, cuda:N", lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", value))
)
DOWNLOADABLE = "mnist", "fashion_mnist", "cifar10", "cifar100"  # by torchvision
_RESNET_DEPTH = Rule("of the form 6n+2: 8, 14, 20, ...", lambda value: value >= 8 and value % 6 == 2)


def _option(doc: str, rule: Rule = _ANY, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"doc": doc, "rule": rule})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and how it is cut into batches."""

    name: str = _option("dataset", _one_of("digits", *DOWNLOADABLE, "imagenet", "image_folder"))
    root: str | None = _option("folder of the dataset's files, null for its usual place", _NOT_EMPTY, None)
    download: bool = _option("whether files that are not there are fetched by torchvision", default=False)
    train_images: int | None = _option(
        "number of training images used, the same ones at every seed; null for all", _at_least(2), None
    )
    validation_images: int | None = _option(
        "number of training images kept aside, the same ones at every seed, and tested on in place of the "
        "test images, as when settings are chosen; null for none",
        _at_least(1),
        None,
    )
    batch_size: int = _option("images per training batch", _at_least(2), 64)
    eval_batch_size: int = _option("images per test batch", _at_least(1), 512)
    image_size: int | None = _option(
        "height and width of the images in pixels, null for the dataset's own", _at_least(1), None
    )
    augment: bool = _option(
        "whether training images are shifted, cropped and mirrored at random, as is usual for the dataset",
        default=False,
    )
    workers: int = _option("processes that load data, 0 for the run's own", _at_least(0), 0)

    def __post_init__(self) -> None:
        if self.name in ("imagenet", "image_folder") and self.root is None:
            wanted = f"the folder of {self.name}'s train and val"
            raise _Invalid("root", f"found {_shown(None)}, allowed: {wanted}")
        if self.download and self.name not in DOWNLOADABLE:
            wanted = f"false for {self.name}, true for {', '.join(DOWNLOADABLE)}"
            raise _Invalid("download", f"found {_shown(True)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and the weights that it has before any training."""

    name: str = _option("architecture", _NOT_EMPTY, "resnet")
    depth: int = _option("layers with weights of the resnet", _RESNET_DEPTH, 8)
    width: int = _option("filters of the resnet's first stage", _at_least(1), 16)
    weights: str | None = _option(
        "published weights of a torchvision or timm network, null for random ones", _NOT_EMPTY, None
    )
    init: str | None = _option(
        "distribution of random weights, null for the network's own", _one_of(*INITS), None
    )
    channels_last: bool = _option(
        "whether channels lie next to each other in memory, which is faster for some networks", default=False
    )

    def __post_init__(self) -> None:
        names = model_names(self.name)
        if self.name not in names:
            wanted = f"resnet, vgg19, torchvision/NAME, timm/NAME{_close(self.name, names)}"
            raise _Invalid("name", f"found {_shown(self.name)}, allowed: {wanted}")
        weights = weights_names(self.name)
        if self.weights is not None and self.weights not in weights:
            wanted = f"for {self.name} {', '.join(['null', *weights])}"
            raise _Invalid("weights", f"found {_shown(self.weights)}, allowed: {wanted}")
        if self.init is not None and self.weights is not None:
            wanted = f"null beside weights, which are {self.weights}"
            raise _Invalid("init", f"found {_shown(self.init)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of weights by SGD."""

    epochs: int = _option("passes over the training data", _at_least(0))
    lr: float = _option("learning rate at the start", _POSITIVE)
    momentum: float = _option("momentum of SGD", _BELOW_ONE, 0.9)
    weight_decay: float = _option("weight decay of SGD", _at_least(0), 5e-4)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Tuning of weights under masks that stay as they are, for comparison (Eq. 9)."""

    under: str = _option(
        "whose masks: those that the search starts from, or the jackpot's, after the search",
        _one_of("initial", "jackpot", "both"),
        "initial",
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Where the pre-trained weights come from."""

    checkpoint: str | None = _option("state_dict file to use, null to train and cache", _NOT_EMPTY, None)
    cache: str = _option("folder of the weights trained once", _NOT_EMPTY, "runs/pretrained")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for the jackpot."""

    epochs: int = _option("passes over the training data", _at_least(0))
    init: str = _option("criterion of the initial masks", _one_of(*CRITERIA), "magnitude")
    method: str = _option("how masks follow scores", _one_of(*METHODS), "edge_popup")
    recipe: str = _option("how scores are trained, but for what is given below", _one_of(*RECIPES), "jackpot")
    lr: float | None = _option("learning rate of the scores at the start", _POSITIVE, None)
    momentum: float | None = _option("momentum of SGD", _BELOW_ONE, None)
    weight_decay: float | None = _option("weight decay of SGD", _at_least(0), None)
    growth: float | None = _option("progress at which masks have all their zeros", _PROGRESS, None)
    temperature: float | None = _option("of the soft masks until then, 0 for none", _at_least(0), None)
    kept_score: float = _option("initial score of kept weights", default=1.0)
    pruned_score: float = _option("initial score of pruned weights", default=0.95)
    swap_limit: float | None = _option(
        "largest share of kept weights replaced in one step, annealed; null for no limit", _SHARE, None
    )
    adapt_norm: bool = _option("whether normalisation statistics follow the masks", default=True)
    reestimate_norm: bool | None = _option(
        "whether they are estimated anew after the search, null for all but the paper's edge_popup",
        default=None,
    )
    checkpoint_every: int = _option("steps after which an interrupted search goes on", _at_least(1), 500)

    @property
    def reestimates_norm(self) -> bool:
        """Whether normalisation statistics are estimated anew after the search."""
        if self.reestimate_norm is None:
            return self.recipe != "paper" or self.method == "supermask"
        return self.reestimate_norm

    def __post_init__(self) -> None:
        if not self.pruned_score < self.kept_score:
            raise _Invalid(
                "pruned_score",
                f"found {self.pruned_score}, allowed: a number < kept_score, which is {self.kept_score}",
            )
        if self.swap_limit is not None and (self.recipe != "paper" or self.growth):
            raise _Invalid("swap_limit", f"found {self.swap_limit}, allowed with recipe paper and no growth")
        growth = RECIPES[self.recipe].growth if self.growth is None else self.growth
        if self.method == "edge_popup" and self.temperature and not growth:
            raise _Invalid("temperature", f"found {self.temperature}, allowed with growth > 0")
        if self.method == "supermask":
            for name in ("growth", "temperature", "swap_limit", "kept_score", "pruned_score"):
                if (value := getattr(self, name)) != getattr(SearchConfig, name):
                    raise _Invalid(name, f"found {_shown(value)}, allowed with method edge_popup")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run depends on.

    ``config_list`` is NNI's, plain dicts passed on unchanged: ``list(config.config_list)``.
    """

    seed: int = _option("seed of all that is random", _SEED, 0)
    output: str = _option("folder for everything the run writes", _NOT_EMPTY)
    device: str = _option("where the run computes", _DEVICE, "auto")
    data: DataConfig
    model: ModelConfig
    pretrain: PretrainConfig
    config_list: tuple[dict[str, Any], ...] = _option("what to prune, and how much", _NOT_EMPTY)
    search: SearchConfig
    finetune: FinetuneConfig


# -- reading


def load_config(
    path: str | os.PathLike[str],
    overrides: Mapping[str, object] = {},
) -> RunConfig:
    """Read the YAML file of a run.

    Parameters
    ----------
    path
        The file. ``1e-3`` is a number there, though YAML 1.1 calls it a string.
    overrides
        Values by dotted name, ``{"search.lr": 1.0, "config_list.0.sparse_ratio": 0.95}``, that take the place
        of the file's before these are checked. Numpy scalars are accepted, and integral floats for integers,
        for that is what NNI's tuners hand over.

    Raises
    ------
    ExperimentConfigError
        If the file is missing, no YAML mapping, or has a key twice; for a key that is unknown or missing, and
        a value of the wrong type or out of range, in the file or in an override. The message names the file,
        the key, what was found and what is allowed.
    """
    try:
        raw = _parse(Path(path).read_bytes())
    except OSError as error:
        raise ExperimentConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExperimentConfigError(f"{path}: is not valid YAML: {error}") from error
    try:
        for name, value in overrides.items():
            raw = _overridden(raw, RunConfig, name.split("."), value, name)
        return _read_section(RunConfig, raw, "")
    except _Invalid as error:
        guilty = [name for name in overrides if _related(name, error.key)]
        blame = f" (with the override {', '.join(guilty)})" if guilty else ""
        raise ExperimentConfigError(f"{path}: {error}{blame}") from None


def parse_override(text: str) -> tuple[str, object]:
    """Split ``search.lr=1.0`` into the dotted name and the value, which is read as YAML.

    Raises
    ------
    ExperimentConfigError
        If there is no name, no ``=``, or the value is not valid YAML.
    """
    name, equals, value = text.partition("=")
    if not name.strip() or not equals:
        raise ExperimentConfigError(f"override {text!r}: allowed is KEY=VALUE, such as search.lr=1.0")
    try:
        return name.strip(), _parse(value)
    except ValueError as error:
        raise ExperimentConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error


class _Invalid(ExperimentConfigError):
    """A finding about one key, before the file is known."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key or 'the top level'}: {text}")
        self.key = key
        self.text = text


def _read_section(cls: Any, raw: object, key: str) -> Any:
    """Read a mapping as the dataclass ``cls``."""
    if not isinstance(raw, dict):
        raise _Invalid(key, f"found {_shown(raw)}, allowed: {_allowed(cls, _ANY)}")
    kinds = get_type_hints(cls)
    for name in raw:
        if name not in kinds:
            raise _Invalid(_join(key, name), _unknown(name, kinds))
    values = {}
    for option in dataclasses.fields(cls):
        name, kind, rule = option.name, kinds[option.name], option.metadata.get("rule", _ANY)
        if name in raw:
            values[name] = _read_value(kind, rule, raw[name], _join(key, name))
        elif option.default is MISSING:
            wanted = f"{_allowed(kind, rule)} ({option.metadata.get('doc', kind.__doc__)})"
            raise _Invalid(_join(key, name), f"is missing, allowed: {wanted}")
    try:
        return cls(**values)
    except _Invalid as error:
        raise _Invalid(_join(key, error.key), error.text) from None


def _read_value(kind: Any, rule: Rule, raw: Any, key: str) -> Any:
    if raw is None and NoneType in get_args(kind):
        return None
    base = _without_none(kind)
    if dataclasses.is_dataclass(base):
        return _read_section(base, raw, key)
    if get_origin(base) is tuple and isinstance(raw, list) and rule.holds(raw):
        return tuple(_read_entry(entry, _join(key, i)) for i, entry in enumerate(raw))
    fits = type(raw) is base  # not isinstance: true and false are no integers here
    if base is float:
        # The comparison is false for nan, and safe for integers beyond all floats.
        fits = type(raw) in (int, float) and abs(raw) <= sys.float_info.max
    if not fits or not rule.holds(raw):
        raise _Invalid(key, f"found {_shown(raw)}, allowed: {_allowed(kind, rule)}")
    return base(raw)


def _read_entry(raw: object, key: str) -> dict[str, Any]:
    """Copy an entry of NNI's config list, whose keys are NNI's to judge."""
    try:
        # Equal only if all keys are strings; fails for dates, nan, and aliases to themselves.
        entry = json.loads(json.dumps(raw, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        entry = None
    if not isinstance(raw, dict) or not raw or entry != raw:
        wanted = "a mapping that is not empty, with string keys and plain values"
        raise _Invalid(key, f"found {_shown(raw)}, allowed: {wanted}")
    return entry


def _overridden(node: Any, kind: Any, parts: list[str], value: object, name: str) -> Any:
    """Return ``node`` with the value at ``parts`` replaced, in a copy, for YAML aliases share nodes."""
    if not parts:
        value = value.item() if isinstance(value, np.generic) else value
        return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value
    part, *rest = parts
    child: Any = None  # inside NNI's entries there is no schema
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        if part not in kinds:
            raise _Invalid(name, f"this override is about an {_unknown(part, kinds)}")
        child = kinds[part]
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            wanted = f"allowed: 0 to {len(node) - 1}"
            raise _Invalid(name, f"this override is about entry {part!r} of {len(node)}, {wanted}")
        at = int(part)
        return [*node[:at], _overridden(node[at], child, rest, value, name), *node[at + 1 :]]
    if not isinstance(node, dict):
        raise _Invalid(name, f"this override looks for {part!r} in {_shown(node)}, which has no keys")
    return {**node, part: _overridden(node.get(part, {}), child, rest, value, name)}


def _related(a: str, b: str) -> bool:
    """Tell whether one dotted name is the other or a parent of it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _without_none(kind: Any) -> Any:
    return next((arg for arg in get_args(kind) if NoneType in get_args(kind) and arg is not NoneType), kind)


def _shown(raw: object) -> str:
    text = repr(raw)
    return f"{text if len(text) <= 100 else text[:97] + '...'} ({type(raw).__name__})"


def _allowed(kind: Any, rule: Rule) -> str:
    base = _without_none(kind)
    if dataclasses.is_dataclass(base):
        return f"a mapping with keys out of {', '.join(get_type_hints(base))}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return ("null or " if base is not kind else "") + f"{names.get(base, 'a list')} {rule.allowed}".strip()


def _unknown(name: object, names: Iterable[str]) -> str:
    return f"unknown key {name!r}, allowed: {', '.join(names)}{_close(str(name), names)}"


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# -- writing


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and scalars: what its YAML file holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(obj: object) -> str:
    """Return 12 hex digits that stand for a config dataclass, or a dict of such and of plain values.

    Equal contents have equal hashes, in every process and whatever the order of keys.
    """
    canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"), default=to_dict)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def dump_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the YAML file from which `load_config` reads an equal config.

    Raises
    ------
    OutputFolderError
        If the folder cannot be created or written; the file is whole or not there.
    """
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


# -- YAML


class _Loader(yaml.SafeLoader):
    """YAML without a key given twice, of which PyYAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose the mapping, and look at its keys before merge keys (``<<``) add others."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _yaml in (_Loader, _Dumper):
    # YAML 1.1 wants a dot and a signed exponent, so that PyYAML reads 1e-3 as a string.
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _parse(text: str | bytes) -> object:
    """Parse YAML; every error is a ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
