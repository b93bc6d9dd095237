"""CSV files: every number of a table or a figure, with its settings and commands."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Collection, Iterable, Sequence

from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.report import paper
from nni_jackpot.experiment.report.figures import Figure
from nni_jackpot.experiment.report.measures import RECIPE, Measure
from nni_jackpot.experiment.report.wording import name_of

# Numbers that rows may have: their columns, and the factors of their units.
_COSTS = {
    "total_epochs": ("epochs with pre-training", 1),
    "seconds": ("seconds", 1),
    "peak_memory_bytes": ("peak memory, bytes", 1),
    "overlap": ("overlap with the jackpot %", 100),
}


def of_measures(measures: Iterable[Measure]) -> str:
    """Return a CSV file with a line per measure; accuracies, overlaps and sparsities are in percent."""
    return _csv([_measure(one) for one in measures])


def of_figure(figure: Figure) -> str:
    """Return a CSV file with a line per point of a figure."""
    return _csv(
        [
            {"panel": panel.title, "line": line.label, figure.x: _rounded(x), **_statistics(figure.y, values)}
            for panel in figure.panels
            for line in panel.lines
            for x, values in line.points.items()
        ]
    )


def _measure(one: Measure) -> dict[str, object]:
    published = paper.accuracy_of(one)
    scale = 100 if one.measured.is_percent else 1
    return {
        "kind": one.kind,
        "name": name_of(one.kind, one.init),
        "weights": one.settings["weights"],
        "init": one.init,
        "method": one.method,
        "recipe": one.settings.get(RECIPE, ""),
        "sparsity %": _rounded(100 * one.sparsity),
        "epochs": one.epochs,
        **_statistics(one.column, [scale * value for value in one.values.values()]),
        "overlap %": _rounded(100 * statistics.mean(one.overlaps.values())) if one.overlaps else None,
        **{MEASURES[name].words: _mean_of(one, name) for name in [*one.rows[0].values][1:]},
        **{words: _known(one.mean(name), scale) for name, (words, scale) in _COSTS.items()},
        "weights changed": " ".join(sorted({str(row.weights_changed) for row in one.rows} - {"None"})),
        "paper, accuracy %": published.accuracy if published else None,
        "paper, standard deviation": published.deviation if published else None,
        "seeds": " ".join(map(str, one.runs)),
        "commands": "; ".join(run.command for run in one.runs.values()),
        "settings": json.dumps(_effective(one), sort_keys=True),
    }


def _mean_of(one: Measure, name: str) -> float:
    scale = 100 if MEASURES[name].is_percent else 1
    return _rounded(scale * statistics.mean(row.values[name] for row in one.rows))


def _known(value: float | None, scale: float) -> float | None:
    return None if value is None else _rounded(scale * value)


def _effective(one: Measure) -> dict[str, object]:
    """Return the settings, with the recipe's values."""
    values = next(iter(one.runs.values())).effective
    return {name: values.get(name, value) for name, value in one.settings.items()}


def _statistics(name: str, values: Collection[float]) -> dict[str, object]:
    deviation = _rounded(statistics.stdev(values)) if len(values) > 1 else None
    return {name: _rounded(statistics.mean(values)), "standard deviation": deviation, "n": len(values)}


def _rounded(value: float) -> float:
    return round(value, 4)


def _csv(lines: Sequence[dict[str, object]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
