"""The lines of the paper's figures, for our own runs; `plot` draws them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.experiment.report.measures import INIT, RECIPE, SPARSITY, Measure, families, labels
from nni_jackpot.experiment.report.runs import Run
from nni_jackpot.experiment.report.wording import percent
from nni_jackpot.masks import Masks, load_masks, mask_overlap


@dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes
    ----------
    label
        Name; lines of the same name look the same in all panels.
    points
        Percentages of all seeds, by the value on the x axis.
    is_reference
        Whether the line is a reference, not a result.
    """

    label: str
    points: dict[float, list[float]]
    is_reference: bool = False


@dataclass(frozen=True)
class Panel:
    """A diagram."""

    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Figure:
    """Diagrams side by side.

    Attributes
    ----------
    name
        Name of the figure's files.
    title
        What the figure shows, with the number of the paper's figure.
    x, y
        Names of the axes.
    panels
        At least one diagram.
    note
        How to read the figure.
    is_log
        Whether the x axis is logarithmic.
    """

    name: str
    title: str
    x: str
    y: str
    panels: list[Panel]
    note: str = ""
    is_log: bool = False


_SPARSITY, _ACCURACY = "sparsity %", "test accuracy %"


def figures(measures: Sequence[Measure]) -> list[Figure]:
    """Return the figures for which runs exist, of one network on one data set.

    Raises
    ------
    CheckpointError
        If a file of masks is damaged.
    """
    if any(one.measure != "accuracy" for one in measures):  # the paper's figures are about accuracies
        return []
    made = [make(measures) for make in (weights, criteria, overlaps, convergence, methods, tuning)]
    return [figure for figure in made if figure is not None]


def weights(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 2: jackpots in pre-trained and in random weights, against sparsity."""
    series = _series(_by_the_paper_s_search(measures))
    if len({group[0].is_pretrained for group in series}) < 2:
        return None
    title = "Jackpots in pre-trained and in random weights (the paper's Fig. 2)"
    return _against_sparsity("fig2", title, series, measures)


def criteria(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 3: masks of the criteria alone, and jackpots, against sparsity."""
    alone = _series(one for one in measures if one.kind == "initial" and one.is_pretrained)
    norm = _series(one for one in measures if one.kind == "initial_norm" and one.is_pretrained)
    if not alone:
        return None
    jackpots = _series(one for one in _by_the_paper_s_search(measures) if one.is_pretrained)
    names = labels(_firsts(alone), SPARSITY)
    panels = []
    for title, series in (("as they are", alone), ("norm statistics re-estimated", norm)):
        lines = [_line(name, group) for name, group in zip(names, series, strict=True)]
        panels.append(_panel(title, [*lines, *_lines(jackpots)], measures, _firsts(alone)))
    title = "Masks of the criteria alone, and jackpots (the paper's Fig. 3)"
    return Figure("fig3", title, _SPARSITY, _ACCURACY, panels)


def overlaps(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 4: overlap of the criteria's masks with jackpots, against sparsity."""
    alike: dict[str, list[list[Measure]]] = defaultdict(list)
    for group in _series(one for one in measures if one.kind == "jackpot" and one.is_pretrained):
        alike[group[0].without(INIT, SPARSITY)].append(group)
    compared = [(family, group) for family in alike.values() if len(family) > 1 for group in family]
    names = labels([jackpots[0] for _, jackpots in compared], SPARSITY)
    panels = []
    for name, (family, jackpots) in zip(names, compared, strict=True):
        lines = [Line(f"{masks[0].init} mask", _mask_overlaps(masks, jackpots)) for masks in family]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        chance = {
            x: [100 - 2 * x * (1 - x / 100)] for x in sorted({x for line in lines for x in line.points})
        }
        panels.append(Panel(name, [*lines, Line("by chance", chance, is_reference=True)]))
    if not panels:
        return None
    title = "Overlap of the criteria's masks with jackpots (the paper's Fig. 4)"
    note = "A jackpot resembles the mask it was found from: only random's compares the others without bias."
    return Figure("fig4", title, _SPARSITY, "overlap %", panels, note)


def convergence(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 5: accuracy against epochs of search, by the criterion of the initial mask."""
    jackpots = [one for one in measures if one.kind == "jackpot" and one.is_pretrained]
    drawn = (one for one in jackpots if all(run.curve for run in one.runs.values()))
    compared = families(drawn, INIT)
    names = labels(_firsts(compared), INIT, SPARSITY)
    panels = []
    for name, family in zip(names, compared, strict=True):
        lines = [Line(f"from {one.init}", _curve(one.runs.values())) for one in family]
        panels.append(_panel(f"{name}, {percent(family[0].sparsity)} sparsity", lines, measures, family))
    if not panels:
        return None
    title = "Convergence by the initial mask (the paper's Fig. 5)"
    note = "Under a ramp (search.ramp_end), masks do not have all their zeros in the first epochs."
    return Figure("fig5", title, "epochs of search", _ACCURACY, panels, note)


def methods(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 6: search methods, in random and in pre-trained weights, against sparsity.

    Only recipes that were run with several methods are shown.
    """
    ways: dict[str, set[str]] = defaultdict(set)
    series = _series(_like_the_paper(measures, "jackpot"))
    for one, *_ in series:
        ways[one.settings[RECIPE]].add(one.method)
    series = [group for group in series if len(ways[group[0].settings[RECIPE]]) > 1]
    if not series:
        return None
    title = "Ways to search, in random and in pre-trained weights (the paper's Fig. 6)"
    return _against_sparsity("fig6", title, series, measures)


def tuning(measures: Sequence[Measure]) -> Figure | None:
    """Return Fig. 7: jackpots, with frozen and with tuned weights, against sparsity."""
    tuned = _series(one for one in _like_the_paper(measures, "jackpot_tuned") if one.is_pretrained)
    if not tuned:
        return None
    ends = [one for group in tuned for one in group]
    series = _series(one for one in measures if one.kind == "jackpot" and any(map(one.is_part_of, ends)))
    title = "Jackpots, and the same with their weights tuned (the paper's Fig. 7)"
    return _against_sparsity("fig7", title, [*series, *tuned], measures)


def _like_the_paper(measures: Iterable[Measure], kind: str) -> list[Measure]:
    """Return measures of a kind; in pre-trained weights those from magnitude's mask, if any exist."""
    found = [one for one in measures if one.kind == kind]
    usual = [one for one in found if one.init == "magnitude" and one.is_pretrained]
    return [one for one in found if one in usual or not one.is_pretrained] if usual else found


def _by_the_paper_s_search(measures: Iterable[Measure]) -> list[Measure]:
    return [one for one in _like_the_paper(measures, "jackpot") if one.method == "edge_popup"]


def _series(measures: Iterable[Measure]) -> list[list[Measure]]:
    """Return groups of at least two measures that differ only in their sparsity."""
    return [sorted(group, key=lambda one: one.sparsity) for group in families(measures, SPARSITY)]


def _firsts(groups: Iterable[Sequence[Measure]]) -> list[Measure]:
    return [group[0] for group in groups]


def _against_sparsity(
    name: str, title: str, series: Sequence[Sequence[Measure]], measures: Sequence[Measure]
) -> Figure:
    panel = _panel("", _lines(series), measures, _firsts(series))
    return Figure(name, title, _SPARSITY, _ACCURACY, [panel])


def _panel(title: str, lines: list[Line], measures: Sequence[Measure], drawn: Sequence[Measure]) -> Panel:
    """Return a panel of lines, with horizontal lines for the dense networks that the measures start from."""
    dense = [one for one in measures if one.kind == "dense" and one.is_pretrained]
    dense = [one for one in dense if any(map(one.is_part_of, drawn))]
    ends = [end(x for line in lines for x in line.points) for end in (min, max)]
    levels = [_in_percent(one.values.values()) for one in dense]
    across = [
        Line(name, dict.fromkeys(ends, level), is_reference=True)
        for name, level in zip(labels(dense), levels, strict=True)
    ]
    return Panel(title, [*lines, *across])


def _lines(series: Sequence[Sequence[Measure]]) -> list[Line]:
    names = labels(_firsts(series), SPARSITY)
    return [_line(name, group) for name, group in zip(names, series, strict=True)]


def _line(name: str, group: Sequence[Measure]) -> Line:
    return Line(name, {_percent(one.sparsity): _in_percent(one.values.values()) for one in group})


def _curve(runs: Iterable[Run]) -> dict[float, list[float]]:
    """Return the accuracies of several seeds by epoch, in percent."""
    points: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for epoch, accuracy in run.curve.items():
            points[epoch].append(100 * accuracy)
    return dict(sorted(points.items()))


def _mask_overlaps(starts: Sequence[Measure], jackpots: Sequence[Measure]) -> dict[float, list[float]]:
    """Return the overlaps of initial masks with jackpots, in percent, by sparsity: one per seed."""
    start_of = {(one.sparsity, seed): run for one in starts for seed, run in one.runs.items()}
    points: dict[float, list[float]] = defaultdict(list)
    for jackpot in jackpots:
        for seed, run in jackpot.runs.items():
            if (start := start_of.get((jackpot.sparsity, seed))) is None:
                continue
            files = start.folder / "start.pth", run.folder / "masks.pth"
            if all(file.exists() for file in files):  # the tables do not need these large files
                points[_percent(jackpot.sparsity)].append(100 * mask_overlap(*map(_masks, files)).total)
    return dict(points)


def _masks(path: Path) -> Masks:
    load_result(path.parent).check_files(path.name)
    return load_masks(path)


def _percent(share: float) -> float:
    return round(100 * share, 4)  # 95, not 95.00000000000001


def _in_percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]
