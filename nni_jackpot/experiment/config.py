"""One run is one YAML file, read strictly into these dataclasses: a new setting is one more field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.models import model_names, weights_names
from nni_jackpot.experiment.models.initial import INITS
from nni_jackpot.experiment.schema import strict_yaml
from nni_jackpot.experiment.schema.paths import with_home
from nni_jackpot.experiment.schema.rules import (
    Invalid,
    Rule,
    between,
    close_match,
    one_of,
    option,
    overridden,
    read_section,
    related,
    shown,
)
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masking.methods import METHODS
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.search.options import OLD_KEYWORDS, OLD_RECIPES

OF_OPTIMIZER = ("lr", "momentum", "weight_decay")
OF_MASKS = ("growth", "temperature", "hardening")
RECIPES = ("paper", "jackpot")

# -- the schema

_NOT_EMPTY = Rule("that is not empty", lambda value: len(value) > 0)
_BELOW_ONE = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)
_PROGRESS = Rule(">= 0 and <= 1", lambda value: 0 <= value <= 1)
_SHARE = Rule("> 0 and <= 1", lambda value: 0 < value <= 1)
_SEED = Rule(">= 0 and < 2**32", lambda value: 0 <= value < 2**32)
_DEVICE = Rule(
    "out of auto, cpu, cuda, cuda:N", lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value))
)
DOWNLOADABLE = "mnist", "fashion_mnist", "cifar10", "cifar100"  # by torchvision
# The deepest is that of He et al. (2016, "Deep residual learning", Sec. 4.2).
_RESNET_DEPTH = Rule(
    "of the form 6n+2: 8, 14, 20, ..., 1202", lambda value: 8 <= value <= 1202 and value % 6 == 2
)
# Beyond these a network of float32 computes with numbers that are none, after a step or two.
_RATE = Rule("> 0 and <= 1e30", lambda value: 0 < value <= 1e30)
_DECAY = Rule(">= 0 and <= 1e30", lambda value: 0 <= value <= 1e30)
_POSITIVE = Rule("> 0 and <= 1e6", lambda value: 0 < value <= 1e6)
_SCORE = Rule(">= -1e6 and <= 1e6", lambda value: -1e6 <= value <= 1e6)
_EPOCHS = between(0, 10**6)
_MOST_IMAGES = 10**9


def _can_be_a_path(value: str) -> bool:
    try:
        return len(value) > 0 and b"\0" not in os.fsencode(value)
    except UnicodeError:
        return False


_PATH = Rule("that is not empty, and can be a path", _can_be_a_path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and how it is cut into batches."""

    name: str = option("dataset", one_of("digits", *DOWNLOADABLE, "imagenet", "image_folder"))
    root: str | None = option("folder of the dataset's files, null for its usual place", _PATH, None)
    download: bool = option("whether files that are not there are fetched by torchvision", default=False)
    train_images: int | None = option(
        "number of training images used, the same ones at every seed; null for all",
        between(2, _MOST_IMAGES),
        None,
    )
    validation_images: int | None = option(
        "number of training images kept aside, the same ones at every seed, and tested on in place of the "
        "test images, as when settings are chosen; null for none",
        between(1, _MOST_IMAGES),
        None,
    )
    batch_size: int = option("images per training batch", between(2, 10**6), 64)
    eval_batch_size: int = option("images per test batch", between(1, 10**6), 512)
    image_size: int | None = option(
        "height and width of the images in pixels, null for the dataset's own", between(1, 4096), None
    )
    augment: bool = option(
        "whether training images are shifted, cropped and mirrored at random, as is usual for the dataset",
        default=False,
    )
    workers: int = option("processes that load data, 0 for the run's own", between(0, 256), 0)

    def __post_init__(self) -> None:
        if self.name in ("imagenet", "image_folder") and self.root is None:
            wanted = f"the folder of {self.name}'s train and val"
            raise Invalid("root", f"found {shown(None)}, allowed: {wanted}")
        if self.download and self.name not in DOWNLOADABLE:
            wanted = f"false for {self.name}, true for {', '.join(DOWNLOADABLE)}"
            raise Invalid("download", f"found {shown(True)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and the weights that it has before any training."""

    name: str = option("architecture", _NOT_EMPTY, "resnet")
    depth: int = option("layers with weights of the resnet", _RESNET_DEPTH, 8)
    width: int = option("filters of the resnet's first stage", between(1, 1024), 16)
    weights: str | None = option(
        "published weights of a torchvision or timm network, null for random ones", _NOT_EMPTY, None
    )
    init: str | None = option(
        "distribution of random weights, null for the network's own", one_of(*INITS), None
    )
    channels_last: bool = option(
        "whether channels lie next to each other in memory, which is faster for some networks", default=False
    )

    def __post_init__(self) -> None:
        names = model_names(self.name)
        if self.name not in names:
            wanted = f"resnet, vgg19, torchvision/NAME, timm/NAME{close_match(self.name, names)}"
            raise Invalid("name", f"found {shown(self.name)}, allowed: {wanted}")
        weights = weights_names(self.name)
        if self.weights is not None and self.weights not in weights:
            wanted = f"for {self.name} {', '.join(['null', *weights])}"
            raise Invalid("weights", f"found {shown(self.weights)}, allowed: {wanted}")
        for size in ("depth", "width"):
            if (value := getattr(self, size)) != (
                usual := getattr(ModelConfig, size)
            ) and self.name != "resnet":
                raise Invalid(
                    size, f"found {value}, allowed: {usual} for {self.name}, whose size its name says"
                )
        if self.init is not None and self.weights is not None:
            wanted = f"null beside weights, which are {self.weights}"
            raise Invalid("init", f"found {shown(self.init)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of weights by SGD."""

    epochs: int = option("passes over the training data", _EPOCHS)
    lr: float = option("learning rate at the start", _RATE)
    momentum: float = option("momentum of SGD", _BELOW_ONE, 0.9)
    weight_decay: float = option("weight decay of SGD", _DECAY, 5e-4)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Tuning of weights under masks that stay as they are, for comparison (Eq. 9)."""

    under: str = option(
        "whose masks: those that the search starts from, or the jackpot's, after the search",
        one_of("initial", "jackpot", "both"),
        "initial",
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Where the pre-trained weights come from."""

    checkpoint: str | None = option("state_dict file to use, null to train and cache", _PATH, None)
    cache: str = option("folder of the weights trained once", _PATH, "runs/pretrained")


def settings_of_recipe(recipe: str, method: str) -> dict[str, Any]:
    """Return what a recipe says of the settings of a search that can be given beside it."""
    own = METHODS[method].recipes()[OLD_RECIPES.get(recipe, recipe)]
    names = OF_OPTIMIZER if method == "supermask" else OF_OPTIMIZER + OF_MASKS
    return {name: getattr(own, OLD_KEYWORDS[name]) for name in names}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for the jackpot."""

    epochs: int = option("passes over the training data", _EPOCHS)
    init: str = option("criterion of the initial masks", one_of(*CRITERIA), "magnitude")
    method: str = option("how masks follow scores", one_of(*METHODS), "edge_popup")
    recipe: str = option("how scores are trained, but for what is given below", one_of(*RECIPES), "jackpot")
    lr: float | None = option("learning rate of the scores at the start", _POSITIVE, None)
    momentum: float | None = option("momentum of SGD", _BELOW_ONE, None)
    weight_decay: float | None = option("weight decay of SGD", between(0, 10**6), None)
    growth: float | None = option("progress at which masks have all their zeros", _PROGRESS, None)
    temperature: float | None = option("of the soft masks at the start, 0 for none", between(0, 10**6), None)
    hardening: float | None = option("progress at which masks are soft no more", _PROGRESS, None)
    kept_score: float = option("initial score of kept weights", _SCORE, 1.0)
    pruned_score: float = option("initial score of pruned weights", _SCORE, 0.95)
    swap_limit: float | None = option(
        "largest share of kept weights replaced in one step, annealed; null for no limit", _SHARE, None
    )
    adapt_norm: bool = option("whether normalisation statistics follow the masks", default=True)
    reestimate_norm: bool | None = option(
        "whether they are estimated anew after the search, null for all but the paper's edge_popup",
        default=None,
    )
    checkpoint_every: int = option("steps after which an interrupted search goes on", between(1, 10**9), 500)
    checkpoint_minutes: float = option("the same in minutes, where steps take longer", _POSITIVE, 5.0)

    @property
    def reestimates_norm(self) -> bool:
        """Whether normalisation statistics are estimated anew after the search."""
        if self.reestimate_norm is None:
            return self.recipe != "paper" or self.method == "supermask"
        return self.reestimate_norm

    def in_full(self) -> SearchConfig:
        """Say what the recipe says: the search stays the same when a later version has another recipe."""
        own = settings_of_recipe(self.recipe, self.method)
        left_alone = {name: value for name, value in own.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **left_alone)

    def in_short(self) -> SearchConfig:
        """Leave out what the recipe says, for searches to be equal if they do the same."""
        own = settings_of_recipe(self.recipe, self.method)
        same: dict[str, Any] = {name: None for name, value in own.items() if getattr(self, name) == value}
        return dataclasses.replace(self, **same)

    def __post_init__(self) -> None:
        if not self.pruned_score < self.kept_score:
            raise Invalid(
                "pruned_score",
                f"found {self.pruned_score}, allowed: a number < kept_score, which is {self.kept_score}",
            )
        if self.swap_limit is not None and (self.recipe != "paper" or self.growth or self.temperature):
            allowed = "allowed with recipe paper, no growth and no temperature"
            raise Invalid("swap_limit", f"found {self.swap_limit}, {allowed}")
        full = settings_of_recipe(self.recipe, self.method) | {
            name: value for name in OF_OPTIMIZER if (value := getattr(self, name)) is not None
        }
        lr, momentum, decay = (full[name] for name in ("lr", "momentum", "weight_decay"))
        if lr * decay > 2 * (1 + momentum):
            allowed = (
                f"allowed: up to {2 * (1 + momentum) / lr:.3g} with lr {lr}, beyond which scores only grow"
            )
            raise Invalid("weight_decay", f"found {decay}, {allowed}")
        hardening = (
            settings_of_recipe(self.recipe, "edge_popup")["hardening"]
            if self.hardening is None
            else self.hardening
        )
        if self.method == "edge_popup" and self.temperature and not hardening:
            raise Invalid("temperature", f"found {self.temperature}, allowed with hardening > 0")
        if self.method == "supermask":
            for name in (*OF_MASKS, "swap_limit", "kept_score", "pruned_score"):
                if (value := getattr(self, name)) != getattr(SearchConfig, name):
                    raise Invalid(name, f"found {shown(value)}, allowed with method edge_popup")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run depends on.

    ``config_list`` is NNI's, plain dicts passed on unchanged: ``list(config.config_list)``.
    """

    seed: int = option("seed of all that is random", _SEED, 0)
    output: str = option("folder for everything the run writes", _PATH)
    device: str = option("where the run computes", _DEVICE, "auto")
    data: DataConfig
    model: ModelConfig
    pretrain: PretrainConfig
    config_list: tuple[dict[str, Any], ...] = option("what to prune, and how much", _NOT_EMPTY)
    search: SearchConfig
    finetune: FinetuneConfig

    def __post_init__(self) -> None:
        for i, entry in enumerate(self.config_list):
            for key in ("op_names_re", "exclude_op_names_re"):
                _check_patterns(entry.get(key), f"config_list.{i}.{key}")


def _check_patterns(patterns: object, key: str) -> None:
    """Find what NNI would have Python compile in the midst of a selection; the rest is NNI's to judge."""
    for pattern in patterns if isinstance(patterns, list) else ():
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise Invalid(key, f"found {shown(pattern)}, allowed: regular expressions ({error})") from None


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
        raw = strict_yaml.parse(strict_yaml.read(path))
    except OSError as error:
        raise ExperimentConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExperimentConfigError(f"{path}: is not valid YAML: {error}") from error
    try:
        for name, value in overrides.items():
            raw = overridden(raw, RunConfig, name.split("."), value, name)
        return with_home(read_section(RunConfig, raw, ""))
    except RecursionError:
        raise ExperimentConfigError(f"{path}: an override has more levels than there can be") from None
    except Invalid as error:
        guilty = [name for name in overrides if related(name, error.key)]
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
        return name.strip(), strict_yaml.parse(value)
    except ValueError as error:
        raise ExperimentConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error


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
    text = strict_yaml.dump(to_dict(config))
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
