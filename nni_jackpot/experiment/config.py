"""One run is one YAML file, read strictly into these dataclasses: a new setting is one more field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_jackpot.criteria import CRITERIA
from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment import strict_yaml
from nni_jackpot.experiment.models import model_names, weights_names
from nni_jackpot.experiment.models.initial import INITS
from nni_jackpot.experiment.paths import with_home
from nni_jackpot.experiment.schema import (
    Invalid,
    Rule,
    at_least,
    close_match,
    one_of,
    option,
    overridden,
    read_section,
    related,
    shown,
)
from nni_jackpot.files import replace_file
from nni_jackpot.recipe import OF_MASKS, OF_OPTIMIZER, RECIPES
from nni_jackpot.supermask import METHODS, recipe_of

# -- the schema

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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and how it is cut into batches."""

    name: str = option("dataset", one_of("digits", *DOWNLOADABLE, "imagenet", "image_folder"))
    root: str | None = option("folder of the dataset's files, null for its usual place", _NOT_EMPTY, None)
    download: bool = option("whether files that are not there are fetched by torchvision", default=False)
    train_images: int | None = option(
        "number of training images used, the same ones at every seed; null for all", at_least(2), None
    )
    validation_images: int | None = option(
        "number of training images kept aside, the same ones at every seed, and tested on in place of the "
        "test images, as when settings are chosen; null for none",
        at_least(1),
        None,
    )
    batch_size: int = option("images per training batch", at_least(2), 64)
    eval_batch_size: int = option("images per test batch", at_least(1), 512)
    image_size: int | None = option(
        "height and width of the images in pixels, null for the dataset's own", at_least(1), None
    )
    augment: bool = option(
        "whether training images are shifted, cropped and mirrored at random, as is usual for the dataset",
        default=False,
    )
    workers: int = option("processes that load data, 0 for the run's own", at_least(0), 0)

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
    width: int = option("filters of the resnet's first stage", at_least(1), 16)
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
        if self.init is not None and self.weights is not None:
            wanted = f"null beside weights, which are {self.weights}"
            raise Invalid("init", f"found {shown(self.init)}, allowed: {wanted}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of weights by SGD."""

    epochs: int = option("passes over the training data", at_least(0))
    lr: float = option("learning rate at the start", _POSITIVE)
    momentum: float = option("momentum of SGD", _BELOW_ONE, 0.9)
    weight_decay: float = option("weight decay of SGD", at_least(0), 5e-4)


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

    checkpoint: str | None = option("state_dict file to use, null to train and cache", _NOT_EMPTY, None)
    cache: str = option("folder of the weights trained once", _NOT_EMPTY, "runs/pretrained")


def settings_of_recipe(recipe: str, method: str) -> dict[str, Any]:
    """Return what a recipe says of the settings of a search that can be given beside it."""
    own = recipe_of(recipe, method)
    names = OF_OPTIMIZER if method == "supermask" else OF_OPTIMIZER + OF_MASKS
    return {name: getattr(own, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for the jackpot."""

    epochs: int = option("passes over the training data", at_least(0))
    init: str = option("criterion of the initial masks", one_of(*CRITERIA), "magnitude")
    method: str = option("how masks follow scores", one_of(*METHODS), "edge_popup")
    recipe: str = option("how scores are trained, but for what is given below", one_of(*RECIPES), "jackpot")
    lr: float | None = option("learning rate of the scores at the start", _POSITIVE, None)
    momentum: float | None = option("momentum of SGD", _BELOW_ONE, None)
    weight_decay: float | None = option("weight decay of SGD", at_least(0), None)
    growth: float | None = option("progress at which masks have all their zeros", _PROGRESS, None)
    temperature: float | None = option("of the soft masks at the start, 0 for none", at_least(0), None)
    hardening: float | None = option("progress at which masks are soft no more", _PROGRESS, None)
    kept_score: float = option("initial score of kept weights", default=1.0)
    pruned_score: float = option("initial score of pruned weights", default=0.95)
    swap_limit: float | None = option(
        "largest share of kept weights replaced in one step, annealed; null for no limit", _SHARE, None
    )
    adapt_norm: bool = option("whether normalisation statistics follow the masks", default=True)
    reestimate_norm: bool | None = option(
        "whether they are estimated anew after the search, null for all but the paper's edge_popup",
        default=None,
    )
    checkpoint_every: int = option("steps after which an interrupted search goes on", at_least(1), 500)

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
        hardening = RECIPES[self.recipe].hardening if self.hardening is None else self.hardening
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
    output: str = option("folder for everything the run writes", _NOT_EMPTY)
    device: str = option("where the run computes", _DEVICE, "auto")
    data: DataConfig
    model: ModelConfig
    pretrain: PretrainConfig
    config_list: tuple[dict[str, Any], ...] = option("what to prune, and how much", _NOT_EMPTY)
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
        raw = strict_yaml.parse(Path(path).read_bytes())
    except OSError as error:
        raise ExperimentConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExperimentConfigError(f"{path}: is not valid YAML: {error}") from error
    try:
        for name, value in overrides.items():
            raw = overridden(raw, RunConfig, name.split("."), value, name)
        return with_home(read_section(RunConfig, raw, ""))
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
