"""Methods on equal terms: those with the same share of zeros in the same weights."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from nni_jackpot.experiment.report.measures import LIST, Measure
from nni_jackpot.experiment.report.wording import percent


@dataclass(frozen=True)
class Contest:
    """Methods on equal terms.

    Attributes
    ----------
    title
        Sparsity and, unless single weights are pruned, granularity.
    methods
        At least two, the best one first.
    """

    title: str
    methods: list[Measure]


def contests(measures: Iterable[Measure]) -> list[Contest]:
    """Return the contests among measures of one network on one data set, by increasing sparsity."""
    groups: dict[str, list[Measure]] = defaultdict(list)
    for one in measures:
        if one.kind != "dense":
            groups[json.dumps([one.sparsity, _selection(one)], sort_keys=True)].append(one)
    several = sorted((group for group in groups.values() if len(group) > 1), key=lambda g: g[0].sparsity)
    return [Contest(_title(group[0]), best_first(group)) for group in several]


def best_first(methods: Iterable[Measure]) -> list[Measure]:
    """Return methods by the mean of their main measure, the best one first."""

    def loss(one: Measure) -> float:
        mean = statistics.mean(one.values.values())
        return mean if one.measured.lower_is_better else -mean

    return sorted(methods, key=loss)


def _selection(one: Measure) -> dict[str, object]:
    """Return the config list, without the shares of zeros."""
    listed = {name: value for name, value in one.settings.items() if name.startswith(LIST)}
    return {name: value for name, value in listed.items() if not name.endswith("sparse_ratio")}


def _title(one: Measure) -> str:
    said = [one.settings.get(f"{LIST}0.{key}") for key in ("granularity", "sparse_pattern")]
    shown = [text if isinstance(text, str) else json.dumps(text) for text in said if text is not None]
    return ", ".join([f"{percent(one.sparsity)} sparsity", *shown])
