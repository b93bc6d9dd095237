"""One run is one YAML file, read strictly into these dataclasses: a new setting is one more field.

A config that has been read holds every value that has an effect: what the recipe says is filled in. Equal
configs are therefore equal runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.comparators import COMPARATORS, Comparator, OneShot
from nni_jackpot.experiment.comparators.section import FinetuneConfig
from nni_jackpot.experiment.data import datasets, own_images  # noqa: F401  # register data sets
from nni_jackpot.experiment.data import text as _text  # noqa: F401  # registers the data set of text
from nni_jackpot.experiment.data.preprocess import IMAGENET
from nni_jackpot.experiment.data.section import DataConfig, DataSection, TextConfig
from nni_jackpot.experiment.models import inputs_of
from nni_jackpot.experiment.models.section import ModelSection, TransformersConfig
from nni_jackpot.experiment.presets import PRESETS, check_preset, with_preset
from nni_jackpot.experiment.schema import old_names, strict_yaml
from nni_jackpot.experiment.schema.idle import check_effects
from nni_jackpot.experiment.schema.plugins import MODULES, import_function, import_plugins
from nni_jackpot.experiment.schema.rules import (
    PATH,
    Invalid,
    Reader,
    by_name,
    overridden,
    related,
)
from nni_jackpot.experiment.schema.search import SearchConfig
from nni_jackpot.experiment.schema.training import PretrainConfig
from nni_jackpot.experiment.services import SERVICE_NAMES
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.runtime.settings import SEED, Rule, one_of, option, shown

# -- the schema

_NOT_EMPTY = Rule("that is not empty", lambda value: len(value) > 0)
_DEVICE = Rule(
    "out of auto, cpu, cuda, cuda:N", lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value))
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run depends on.

    ``config_list`` is NNI's, plain dicts passed on unchanged: ``list(config.config_list)``.
    """

    seed: int = option("seed of all random numbers", SEED, 0)
    output: str = option("folder for everything the run writes", PATH, affects="nothing")
    device: str = option("where the run computes", _DEVICE, "auto", affects="nothing")
    plugins: tuple[str, ...] = option(
        "modules that register criteria, methods, budgets, data sets or comparators", MODULES, ()
    )
    trackers: tuple[str, ...] = option(
        "tracking services that get the metrics, beside TensorBoard: wandb, mlflow",
        SERVICE_NAMES,
        (),
        affects="nothing",
    )
    data: DataSection
    model: ModelSection
    pretrain: PretrainConfig = None  # type: ignore[assignment]  # no more than a network's weights need
    config_list: tuple[dict[str, Any], ...] = option(
        "what to prune, and how much; required without a preset", _NOT_EMPTY, ()
    )
    preset: str | None = option(
        "name of a config list that is made for the network, in place of config_list", one_of(PRESETS), None
    )
    sparsity: float | None = option(
        "share of weights or channels that the preset prunes", Rule("> 0 and < 1", lambda v: 0 < v < 1), None
    )
    search: SearchConfig
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    comparators: Mapping[str, Comparator] = by_name(
        "methods that train weights under masks, for comparison, by name", COMPARATORS
    )

    def __post_init__(self) -> None:
        check_preset(self.preset, self.sparsity, bool(self.config_list))
        if self.pretrain is None:
            if getattr(self.model, "weights", "") is None:
                wanted = "a mapping with epochs and lr, or with checkpoint, or weights in the section model"
                raise Invalid("pretrain", f"is missing, allowed: {wanted}")
            object.__setattr__(self, "pretrain", PretrainConfig(epochs=0, lr=0.1))
        self._check_kind()
        if isinstance(self.data, DataConfig) and self.data.is_in_files:
            inputs = IMAGENET if self.data.says_inputs else inputs_of(self.model)
            object.__setattr__(self, "data", self.data.for_network(inputs))
        for i, entry in enumerate(self.config_list):
            for key in ("op_names_re", "exclude_op_names_re"):
                _check_patterns(entry.get(key), f"config_list.{i}.{key}")
        if twice := sorted(self.finetune.comparators().keys() & self.comparators.keys()):
            raise Invalid(f"comparators.{twice[0]}", "finetune asks for it, too; allowed: one of the two")

    def _check_kind(self) -> None:
        """Check that data, network and comparators are of one kind."""
        is_text = isinstance(self.data, TextConfig)
        comes_trained = isinstance(self.model, TransformersConfig)
        if is_text and not comes_trained:
            raise Invalid(
                "model.name", f"found {shown(self.model.name)}, allowed for this data: transformers/..."
            )
        for name in () if is_text else ("task", "file"):
            if (value := getattr(self.model, name, None)) is not None:
                raise Invalid(f"model.{name}", f"found {shown(value)}, allowed for images: null")
        if comes_trained and (self.pretrain.epochs or self.pretrain.checkpoint is not None):
            raise Invalid("pretrain", "found a training, allowed: epochs 0, for the network has its weights")
        for name, own in self.compared.items():
            if not isinstance(own, Comparator | OneShot):  # of a plugin that is not imported
                continue
            if comes_trained and own.from_scratch:
                raise Invalid(
                    f"comparators.{name}.from_scratch", "found true, allowed: false for this network"
                )
            if (self.search.blockwise is not None) == isinstance(own, OneShot):
                continue
            needs = "beside search.blockwise" if isinstance(own, OneShot) else "without search.blockwise"
            key = "finetune.epochs" if name in self.finetune.comparators() else f"comparators.{name}"
            raise Invalid(key, f"found {name}, which is only allowed {needs}")

    @property
    def compared(self) -> dict[str, Comparator]:
        """All comparators by name, in the order in which they run."""
        return {**self.finetune.comparators(), **self.comparators}


def _check_patterns(patterns: object, key: str) -> None:
    """Check the regular expressions, which NNI would compile only while it selects modules."""
    for pattern in patterns if isinstance(patterns, list) else ():
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise Invalid(key, f"found {shown(pattern)}, allowed: regular expressions ({error})") from None


# -- reading


def load_config(
    path: str | os.PathLike[str], overrides: Mapping[str, object] = {}, *, is_stored: bool = False
) -> RunConfig:
    """Read the YAML file of a run.

    Parameters
    ----------
    path
        The file. ``1e-3`` is a number there, though YAML 1.1 calls it a string.
    overrides
        Values by dotted name, ``{"search.lr": 1.0, "config_list.0.sparse_ratio": 0.95}``, that replace the
        values of the file before validation. Numpy scalars are accepted, and integral floats for integers:
        NNI's tuners return them.
    is_stored
        Whether the file belongs to a run that was made before. Its plugins are then not imported: names that
        only they register are accepted.

    Raises
    ------
    ExperimentConfigError
        If the file is missing, is not a YAML mapping or has a key twice; if a plugin cannot be imported; for
        an unknown or a missing key, or a value of the wrong type or out of range, in the file or in an
        override. The message names the file, the key, what was found and what is allowed.
    """
    return read_config(strict_yaml.parse_file(path), path, overrides, is_stored=is_stored)


def read_config(
    raw: object,
    path: str | os.PathLike[str],
    overrides: Mapping[str, object] = {},
    *,
    is_stored: bool = False,
) -> RunConfig:
    """Read the content of a run's YAML file; ``path`` is where it stands, for messages."""
    said: list[str] = []
    overrides = old_names.renamed_overrides(overrides, said)
    raw = old_names.renamed(raw, said)
    try:
        for name, value in overrides.items():
            raw = overridden(raw, name.split("."), value, name)
        given = raw
        raw = with_preset(raw)
        if not is_stored and isinstance(raw, dict) and "plugins" in raw:
            import_plugins(raw["plugins"], Path(path).parent)
        if not is_stored and isinstance(raw, dict) and isinstance(raw.get("data"), dict):
            for key in ("transform", "loader"):
                import_function(raw["data"].get(key), f"data.{key}", Path(path).parent)
        reader = Reader(overrides, is_stored and _names_plugins(raw))
        config: RunConfig = reader.section(RunConfig, raw)
        if not is_stored:
            check_effects(
                config, given, overrides.keys(), lambda bare: reader.section(RunConfig, with_preset(bare))
            )
    except RecursionError:
        raise ExperimentConfigError(f"{path}: an override has too many levels") from None
    except Invalid as error:
        guilty = [name for name in overrides if related(name, error.key)]
        blame = f" (with the override {', '.join(guilty)})" if guilty else ""
        raise ExperimentConfigError(f"{path}: {error}{blame}") from None
    if said and not is_stored:
        old_names.warn(str(path), tuple(said))
    return config


def stored_config(raw: Mapping[str, Any], key: str = "") -> RunConfig:
    """Return the config of a run that was made before, from its `to_dict`; raises `Invalid`."""
    raw = with_preset(old_names.renamed(raw, []))
    config: RunConfig = Reader(is_stored=_names_plugins(raw)).section(RunConfig, raw, key)
    return config


def _names_plugins(raw: object) -> bool:
    return isinstance(raw, dict) and bool(raw.get("plugins"))


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
        return name.strip(), strict_yaml.parse(value)
    except ValueError as error:
        raise ExperimentConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error


# -- writing


def to_dict(config: Any, affecting: Collection[str] = ("weights", "accuracy", "nothing")) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and scalars: what its YAML file holds.

    Parameters
    ----------
    config
        The dataclass.
    affecting
        Which settings, by what they affect (`nni_jackpot.runtime.settings.option`).
    """
    found: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.metadata.get("affects", "weights") not in affecting:
            continue
        if "registry" in entry.metadata:
            value = {name: _plain(own, affecting) for name, own in value.items()}
        if "base" in entry.metadata:
            found |= _plain(value, affecting)
        else:
            found[entry.name] = _plain(value, affecting)
    return found


def _plain(value: Any, affecting: Collection[str]) -> Any:
    return to_dict(value, affecting) if is_dataclass(value) else json.loads(json.dumps(value))


def settings_of(config: RunConfig, affecting: Collection[str] = ("weights", "accuracy")) -> dict[str, Any]:
    """Return all settings that affect the results of a run, by dotted name; arguments as for `to_dict`."""
    return dict(_flat(to_dict(config, affecting)))


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of nested dicts, and of lists of dicts, by their dotted name."""
    if isinstance(node, list) and any(isinstance(child, dict) for child in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield name, node
        return
    for key, child in node.items():
        yield from _flat(child, f"{name}.{key}" if name else str(key))


def config_hash(obj: object) -> str:
    """Return 12 hex digits that stand for a config dataclass, or a dict of such and of plain values.

    Equal contents have equal hashes, in every process and for any order of keys.
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
    text = strict_yaml.dump(to_dict(config))
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
