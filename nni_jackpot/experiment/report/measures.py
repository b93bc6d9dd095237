"""Measurements: the same kind of row with the same settings, over all seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.measures import MEASURES, Measured
from nni_jackpot.experiment.report.runs import Run
from nni_jackpot.experiment.report.wording import NAMES, name_of, percent
from nni_jackpot.masking.criteria import CRITERIA

SPARSITY, EPOCHS, INIT, RECIPE = "sparsity", "search.epochs", "search.init", "search.recipe"
METHOD, BLOCKWISE = "search.method", "search.blockwise"
TUNING = "finetune.epochs"
LIST = "config_list."
_RATIO = f"{LIST}0.sparse_ratio"

# Prefixes of the settings that a kind of row depends on. The dense network of ten searches is measured once,
# not ten times.
_NETWORK = ("weights", "data.", "model.", "pretrain.")
_MASK = (*_NETWORK, "config_list.", "preset", "sparsity", INIT)
_DEPENDS_ON = {
    "dense": _NETWORK,
    "initial": _MASK,
    "initial_norm": _MASK,
    "initial_tuned": (*_MASK, "finetune."),
    "jackpot": (*_MASK, "search."),
    "jackpot_tuned": (*_MASK, "search.", "finetune."),
}

# Settings in words, for names of rows and lines; {} is the value.
_WORDS = {
    "weights": "{} weights",
    SPARSITY: "{} sparsity",
    INIT: "from {}",
    METHOD: "by {}",
    RECIPE: "{} recipe",
    EPOCHS: "{} epochs",
    TUNING: "{} epochs of tuning",
    f"{LIST}0.granularity": "granularity {}",
    f"{LIST}0.sparse_pattern": "pattern {}",
    f"{LIST}0.op_types": "of {}",
}
# Values that names omit: the usual weights, and settings with the recipe's value.
_NOT_SAID = ("pre-trained", None)


@dataclass(frozen=True)
class Measure:
    """A kind of row in one setting.

    Attributes
    ----------
    kind
        As in `nni_jackpot.experiment.run.Row`.
    settings
        Settings that the kind depends on, by dotted name; ``sparsity`` is the masks' sparsity, in [0, 1].
    epochs
        Epochs spent after pre-training.
    runs
        Runs by seed.
    """

    kind: str
    settings: dict[str, Any]
    epochs: int
    runs: dict[int, Run]

    @property
    def values(self) -> dict[int, float]:
        """The main measure by seed, such as the accuracy on the test images in [0, 1]."""
        return {seed: run.rows[self.kind].main for seed, run in self.runs.items()}

    @property
    def rows(self) -> list[Row]:
        """The rows of all seeds."""
        return [run.rows[self.kind] for run in self.runs.values()]

    def mean(self, name: str) -> float | None:
        """Return the mean of a number that rows may have, such as ``seconds``; None if one lacks it."""
        found = [getattr(row, name) for row in self.rows]
        return None if None in found else statistics.mean(found)

    @property
    def measured(self) -> Measured:
        """The main measure's words and direction."""
        return MEASURES[self.measure]

    @property
    def column(self) -> str:
        """Title of a column of the main measure."""
        return "accuracy %" if self.measure == "accuracy" else self.measured.words

    @property
    def measure(self) -> str:
        """Name of the main measure."""
        return next(iter(next(iter(self.runs.values())).rows[self.kind].values))

    @property
    def overlaps(self) -> dict[int, float]:
        """Overlap of the masks with the initial masks, in [0, 1], by seed; empty if it is not known."""
        if self.kind == "dense" or self.kind not in NAMES:
            return {}
        found = self.kind.startswith("jackpot")
        return {seed: run.overlap if found else 1.0 for seed, run in self.runs.items()}

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the pruned targets, in [0, 1]."""
        return float(self.settings.get(SPARSITY, 0.0))

    @property
    def network(self) -> str:
        """The network's name, with its size if the size is a setting."""
        name = str(self.settings["model.name"])
        if name != "resnet":
            return name
        return f"{name}-{self.settings['model.depth']} of width {self.settings['model.width']}"

    @property
    def data(self) -> str:
        """The data set's name, with the numbers of images if not all are used."""
        images, aside = (self.settings.get(f"data.{key}") for key in ("train_images", "validation_images"))
        said = [] if images is None else [f"{images:,} images"]
        said += [] if aside is None else [f"tested on {aside:,} of the training images kept aside"]
        return str(self.settings["data.name"]) + (f" ({', '.join(said)})" if said else "")

    @property
    def init(self) -> str:
        """Criterion of the initial mask; empty for the dense network."""
        return str(self.settings.get(INIT, ""))

    @property
    def is_pretrained(self) -> bool:
        """True if the weights are pre-trained, not random."""
        return bool(self.settings["weights"] == "pre-trained")

    @property
    def method(self) -> str:
        """Method of the search; empty without a search."""
        return str(self.settings.get(METHOD, ""))

    def is_part_of(self, other: Measure) -> bool:
        """Return True if another measure has all settings of this one, as a jackpot those of its start."""
        return all(other.settings.get(name) == value for name, value in self.settings.items())

    def without(self, *names: str) -> str:
        """Return a key that is equal for measures that differ only in the named settings."""
        rest = {name: value for name, value in self.settings.items() if name not in names}
        return json.dumps([self.kind, rest], sort_keys=True)


def measure(runs: Iterable[Run]) -> list[Measure]:
    """Return what runs measured, in the order of tables.

    If several runs measured the same with the same seed, the last run counts. A search without epochs is left
    out: it is the initial mask.
    """
    groups: dict[str, tuple[str, dict[str, Any], dict[int, Run]]] = {}
    for run in runs:
        for kind in run.rows:
            settings = {k: v for k, v in run.settings.items() if k.startswith(_depends_on(kind, run))}
            settings.pop("finetune.under", None)  # the kind tells
            is_blockwise = any(name.startswith(f"{BLOCKWISE}.") for name in run.settings)
            if kind.startswith("jackpot") and not settings[EPOCHS] and not is_blockwise:
                continue
            key = json.dumps([kind, settings], sort_keys=True)
            groups.setdefault(key, (kind, settings, {}))[2][run.seed] = run
    return sorted((_measure(*group) for group in groups.values()), key=_order)


def _depends_on(kind: str, run: Run) -> tuple[str, ...]:
    """Return how the names of the settings begin that a kind of row depends on."""
    own = f"comparators.{kind}."
    searched = ("search.",) if run.settings.get(f"{own}start") == "jackpot" else ()
    return (*_DEPENDS_ON.get(kind, (*_MASK, *searched)), own)


def _measure(kind: str, settings: dict[str, Any], runs: dict[int, Run]) -> Measure:
    rows = [run.rows[kind] for run in runs.values()]
    if kind != "dense":
        # Masks differ from the configured ratio by less than a weight per target. The configured ratio reads
        # better, if the masks have it.
        asked, found = settings.get(_RATIO), statistics.mean(row.sparsity for row in rows)
        if isinstance(asked, int | float) and abs(asked - found) < 0.002:
            settings[SPARSITY] = settings.pop(_RATIO)
        else:
            settings[SPARSITY] = round(found, 4)
    return Measure(kind, settings, rows[0].epochs, dict(sorted(runs.items())))


def _order(one: Measure) -> tuple[Any, ...]:
    init = list(CRITERIA).index(one.init) if one.init in CRITERIA else len(CRITERIA)
    kind = list(NAMES).index(one.kind) if one.kind in NAMES else len(NAMES)
    recipe = str(one.settings.get(RECIPE, ""))
    weights = str(one.settings["weights"])
    return (kind, one.kind, weights, init, one.method, recipe, one.epochs, one.sparsity, one.without())


def families(measures: Iterable[Measure], *names: str) -> list[list[Measure]]:
    """Return groups of at least two measures that differ only in the named settings."""
    groups: dict[str, list[Measure]] = defaultdict(list)
    for one in measures:
        groups[one.without(*names)].append(one)
    return [group for group in groups.values() if len(group) > 1]


def labels(measures: Sequence[Measure], *shown: str) -> list[str]:
    """Return names for measures, made of the settings that differ among them.

    Parameters
    ----------
    measures
        The measures.
    *shown
        Settings that are shown elsewhere, and are left out of the names.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for one in measures:
        for name, value in one.settings.items():
            values[name].add(json.dumps(value))
    # A key that one config list has and another one lacks tells them apart as well.
    listed = [one for one in measures if any(name.startswith(LIST) for name in one.settings)]
    for name in [name for name in values if name.startswith(LIST) and name != _RATIO]:
        if any(name not in one.settings for one in listed):
            values[name].add(json.dumps(None))
    said = {"weights", *(name for name, found in values.items() if len(found) > 1)} - set(shown)
    return [", ".join([name_of(one.kind, one.init), *_differences(one, said)]) for one in measures]


def _differences(one: Measure, said: set[str]) -> Iterator[str]:
    if one.kind.startswith("initial"):  # its name contains it
        said = said - {INIT}
    for name, value in one.settings.items():
        if name in said and value not in _NOT_SAID:
            words = _WORDS.get(name, f"{name}={{}}")
            yield (words.replace("epochs", "epoch") if value == 1 else words).format(_text(name, value))


def _text(name: str, value: Any) -> str:
    if name == SPARSITY:
        return percent(value)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return " and ".join(value)
    return value if isinstance(value, str) else json.dumps(value)
