"""The paper's tables, for our own runs, with the measures behind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.report import paper
from nni_jackpot.experiment.report.lead.contests import best_first
from nni_jackpot.experiment.report.measures import EPOCHS, RECIPE, SPARSITY, TUNING, Measure, families, labels
from nni_jackpot.experiment.report.wording import percent, spread

_NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table, and the measures behind it.

    Attributes
    ----------
    name
        Name of the table's files.
    title
        What the table shows, with the number of the paper's table.
    columns, rows
        Header and cells.
    note
        How to read the table.
    measures
        The measures behind the cells.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    measures: list[Measure]


def tables(measures: Sequence[Measure]) -> list[Table]:
    """Return the tables for which runs exist, of one network on one data set."""
    made = [by_cost(measures), by_method(measures), by_epochs(measures), by_recipe(measures)]
    return [table for table in made if table is not None]


def by_cost(measures: Sequence[Measure]) -> Table | None:
    """Return a row for each method and sparsity, with its costs; None for runs that did not record them.

    Cells are empty where a run did not record the number.
    """
    if not any(one.mean("total_epochs") is not None or one.mean("seconds") is not None for one in measures):
        return None
    others = [name for name in measures[0].rows[0].values if name != measures[0].measure]
    ordered = [
        one
        for sparsity in sorted({one.sparsity for one in measures})
        for one in best_first(one for one in measures if one.sparsity == sparsity)
    ]
    published = {id(one): paper.accuracy_of(one) for one in ordered}
    is_compared = any(published.values())
    lines = []
    for name, one in zip(labels(ordered, SPARSITY), ordered, strict=True):
        main, *rest = [_of_all(one, measure) for measure in (one.measure, *others)]
        theirs = [str(published[id(one)] or _NONE)] if is_compared else []
        lines.append([name, main, *theirs, *rest, percent(one.sparsity), *_costs(one), *_origin({"": one})])
    compared = ["paper, accuracy %"] if is_compared else []
    more = [MEASURES[name].words for name in others]
    costs = ["epochs", "seconds", "peak MiB", "overlap %", "weights changed"]
    return Table(
        "cost",
        "Methods and their costs",
        ["", measures[0].column, *compared, *more, "sparsity", *costs, "seeds", "runs"],
        lines,
        "Epochs include those of pre-training where a method needs it; seconds do not. Overlap (Eq. 7) is"
        " that with the jackpot. Peak memory is that of the GPU, or else of the process. A cell is empty if a"
        " run did not record the number.",
        ordered,
    )


def _of_all(one: Measure, measure: str) -> str:
    found = [row.values[measure] for row in one.rows if measure in row.values]
    return MEASURES[measure].spread(found) if len(found) == len(one.rows) else ""


def _costs(one: Measure) -> list[str]:
    """Return epochs, seconds, memory, overlap and whether weights change; empty for what is not known."""
    epochs, seconds, peak, overlap = map(
        one.mean, ("total_epochs", "seconds", "peak_memory_bytes", "overlap")
    )
    changed = {row.weights_changed for row in one.rows}
    return [
        "" if epochs is None else f"{epochs:g}",
        "" if seconds is None else f"{seconds:.1f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
        "" if overlap is None else f"{100 * overlap:.1f}",
        "yes" if changed == {True} else "no" if changed == {False} else "",
    ]


def by_method(measures: Sequence[Measure]) -> Table:
    """Return Table 1, 2 or 3: a row for each method, a column for each sparsity."""
    sparsities = sorted({one.sparsity for one in measures if one.kind != "dense"})
    rows: dict[str, dict[float, Measure]] = defaultdict(dict)
    for one in measures:
        # As in the paper, the first column has the dense network.
        at = sparsities[0] if one.kind == "dense" else one.sparsity
        rows[one.without(SPARSITY)][at] = one
    names = labels([next(iter(row.values())) for row in rows.values()], SPARSITY, EPOCHS, TUNING)
    published = [{s: paper.accuracy_of(one) for s, one in row.items()} for row in rows.values()]
    compared = {s for numbers in published for s, number in numbers.items() if number is not None}

    columns = [measures[0].column]
    for s in sparsities:
        columns += [percent(s), f"paper, {percent(s)}"] if s in compared else [percent(s)]
    lines = []
    for name, row, numbers in zip(names, rows.values(), published, strict=True):
        line = [name]
        for s in sparsities:
            line.append(row[s].measured.spread(row[s].values.values()) if s in row else _NONE)
            if s in compared:
                line.append(str(numbers.get(s) or _NONE))
        by_column = {percent(s): one for s, one in sorted(row.items())}
        lines.append([*line, _epochs(next(iter(row.values()))), *_origin(by_column)])
    number = {"cifar100": 2, "imagenet": 3}.get(measures[0].settings["data.name"], 1)
    theirs = f" (the paper's Table {number})" if measures[0].measure == "accuracy" else ""
    return Table(
        f"table{number}",
        f"{measures[0].measure.capitalize()} by method and sparsity{theirs}",
        [*columns, "epochs", "seeds", "runs"],
        lines,
        "A column for each sparsity; the dense network stands in the first. Epochs are those after"
        " pre-training: of the search, of tuning, or of both.",
        list(measures),
    )


def by_epochs(measures: Sequence[Measure]) -> Table | None:
    """Return Table 4: accuracy and overlap with the initial mask, against epochs of search."""
    series = families((one for one in measures if one.kind == "jackpot"), EPOCHS)
    if not series:
        return None
    starts = [one for one in measures if one.kind == "initial"]
    shown = [
        (name, one)
        for name, group in zip(labels([group[0] for group in series], SPARSITY, EPOCHS), series, strict=True)
        for one in [*(start for start in starts if start.is_part_of(group[0])), *group]
    ]
    published = [paper.by_epochs(one) for _, one in shown]
    is_compared = any(published)

    lines = []
    for (name, one), numbers in zip(shown, published, strict=True):
        ours = [one.measured.spread(one.values.values()), spread(one.overlaps.values())]
        theirs = [str(numbers[0]), f"{numbers[1]:.1f}"] if numbers else [_NONE, _NONE]
        beside = theirs if is_compared else []
        lines.append([name, percent(one.sparsity), str(one.epochs), *ours, *beside, *_origin({"": one})])
    columns = ["", "sparsity", "epochs", "accuracy %", "overlap %"]
    columns += ["paper, accuracy %", "paper, overlap %"] if is_compared else []
    note = "Overlap (Eq. 7) is that with the mask that the search starts from, which stands at 0 epochs."
    if is_compared:
        note += (
            " The paper does not say of which sparsity its Table 4 is; it stands beside 90 % here, for its"
            " accuracies are near those of its Table 1 at 90 %."
        )
    return Table(
        "table4",
        "Accuracy and overlap against epochs of search (the paper's Table 4)",
        [*columns, "seeds", "runs"],
        lines,
        note,
        [one for _, one in shown],
    )


def by_recipe(measures: Sequence[Measure]) -> Table | None:
    """Return the accuracy of jackpots by each recipe of the search, all else equal."""
    searches: dict[str, dict[str, Measure]] = defaultdict(dict)
    for one in measures:
        if one.kind == "jackpot":
            searches[one.without(RECIPE)][one.settings[RECIPE]] = one
    pairs = [(by["paper"], by["default"]) for by in searches.values() if by.keys() >= {"paper", "default"}]
    if not pairs:
        return None
    lines = []
    names = labels([ours for _, ours in pairs], SPARSITY, EPOCHS)
    for name, (theirs, ours) in zip(names, pairs, strict=True):
        both = [theirs.values, ours.values]
        gains = [both[1][seed] - both[0][seed] for seed in ours.runs if seed in theirs.runs]
        cells = [*(spread(values.values()) for values in both), spread(gains) if gains else _NONE]
        origin = _origin({"paper": theirs, "default": ours})
        lines.append([name, percent(ours.sparsity), str(ours.epochs), *cells, *origin])
    return Table(
        "recipes",
        "Recipes of the search side by side",
        ["", "sparsity", "epochs", "recipe paper %", "recipe default %", "gain", "seeds", "runs"],
        lines,
        "Accuracy of jackpots found by the recipe of the paper and by the default recipe, all else equal. The"
        " gain is taken seed by seed.",
        [one for pair in pairs for one in pair],
    )


def _epochs(one: Measure) -> str:
    if one.kind == "jackpot_tuned":
        return f"{one.settings[EPOCHS]} + {one.epochs - one.settings[EPOCHS]}"
    return str(one.epochs) if one.epochs else _NONE


def _origin(row: Mapping[str, Measure]) -> list[str]:
    """Return the number of seeds of a row's cells, by column if it differs, and the runs."""
    counts = {column: len(one.runs) for column, one in row.items()}
    same = len(set(counts.values())) == 1
    seeds = [str(n) if same else f"{n} at {column}" for column, n in counts.items()]
    numbers = {run.number for one in row.values() for run in one.runs.values()}
    return [", ".join(dict.fromkeys(seeds)), _ranges(sorted(numbers))]


def _ranges(numbers: Iterable[int]) -> str:
    """Return ``1-3, 7`` for 1, 2, 3 and 7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)
