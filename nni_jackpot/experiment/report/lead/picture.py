"""The picture that a report leads with: accuracy against cost."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from nni_jackpot.experiment.report.figures import Figure, Line, Panel
from nni_jackpot.experiment.report.lead.contests import Contest, contests
from nni_jackpot.experiment.report.measures import EPOCHS, SPARSITY, TUNING, Measure, labels

Cost = Callable[[Measure], float | None]


def picture(measures: Sequence[Measure]) -> Figure | None:
    """Return the figure of all methods that train; None if no contest has two of them.

    Costs are epochs with those of pre-training, if all are known; else epochs after pre-training or, where no
    method trains, seconds. Several budgets of one method are joined by a line.
    """
    found = contests(measures)
    shown = [one for contest in found for one in contest.methods]
    words, cost_of = _cost(shown)
    shown = [one for one in shown if one.epochs or cost_of is _seconds]
    names = {_method(one): "" for one in shown}
    firsts = [next(one for one in shown if _method(one) == key) for key in names]
    names = dict(zip(names, labels(firsts, *_budgets(shown)), strict=True))
    panels = [_panel(contest, names, cost_of, measures) for contest in found]
    panels = [panel for panel in panels if sum(not line.is_reference for line in panel.lines) > 1]
    if not panels:
        return None
    measured = shown[0].measured
    note = "One point for each method and budget; bars and bands are one standard deviation to both sides."
    return Figure(
        "cost", f"{shown[0].measure.capitalize()} against cost", words, measured.words, panels, note, True
    )


def _cost(shown: Sequence[Measure]) -> tuple[str, Cost]:
    """Return the name of the cost axis, and the cost of a method."""
    trained = [one for one in shown if one.epochs]
    if not trained:
        return "seconds", _seconds
    if all(one.mean("total_epochs") is not None for one in trained):
        return "epochs, with pre-training", lambda one: one.mean("total_epochs")
    return "epochs after pre-training", lambda one: one.epochs


def _seconds(one: Measure) -> float | None:
    return one.mean("seconds")


def _budgets(shown: Sequence[Measure]) -> list[str]:
    """Return the names of settings that the axes show."""
    return [SPARSITY, EPOCHS, TUNING, *(f"comparators.{kind}.epochs" for kind in {one.kind for one in shown})]


def _method(one: Measure) -> str:
    return one.without(*_budgets([one]))


def _panel(contest: Contest, names: dict[str, str], cost_of: Cost, measures: Sequence[Measure]) -> Panel:
    points: dict[str, dict[float, list[float]]] = defaultdict(dict)
    drawn = [one for one in contest.methods if _method(one) in names]
    for one in drawn:
        if cost := cost_of(one):
            points[names[_method(one)]][cost] = _scaled(one)
    lines = [Line(name, dict(sorted(own.items()))) for name, own in points.items()]
    dense = [one for one in measures if one.kind == "dense" and any(map(one.is_part_of, drawn))]
    costs = [cost for own in points.values() for cost in own]
    for name, one in zip(labels(dense), dense, strict=True):
        level = [statistics.mean(_scaled(one))]
        lines.append(Line(name, {end(costs, default=1.0): level for end in (min, max)}, is_reference=True))
    return Panel(contest.title, lines)


def _scaled(one: Measure) -> list[float]:
    scale = 100 if one.measured.is_percent else 1
    return [scale * value for value in one.values.values()]
