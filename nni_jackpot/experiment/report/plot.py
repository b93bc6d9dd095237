"""Drawing of figures: one style, colours for colour-blind readers, the same bytes for the same data."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nni_jackpot.experiment.report.figures import Figure, Line
from nni_jackpot.runtime.terminal import encodable

# Okabe and Ito's palette, without black, and without yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv*"


def blank(panels: int = 1) -> tuple[Any, list[Any]] | None:
    """Return a matplotlib figure with a number of axes, two per row; None without matplotlib."""
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        return None
    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Drawing(figsize=(8, 4 * rows) if columns == 1 else (12, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def draw(figure: Figure) -> dict[str, bytes] | None:
    """Return the files of a figure by suffix, ``png`` and ``svg``; None without matplotlib."""
    if (made := blank(len(figure.panels))) is None:
        return None
    drawing, axes = made
    looks: dict[str, int] = {}
    for panel, diagram in zip(figure.panels, axes, strict=True):
        for line in _side_by_side(panel.lines) if figure.is_log else panel.lines:
            _draw_line(diagram, line, looks)
        diagram.set_title(panel.title, fontsize=10)
        diagram.set_xlabel(figure.x)
        if figure.is_log:
            _scale_by_factors(diagram, sorted({x for line in panel.lines for x in line.points}))
        else:
            diagram.xaxis.get_major_locator().set_params(integer=True)
        diagram.set_ylabel(figure.y)
        diagram.grid(alpha=0.3)
    _explain(drawing, axes)
    return {"png": _saved(drawing, "png", figure.name), "svg": _saved(drawing, "svg", figure.name)}


def _side_by_side(lines: Sequence[Line]) -> list[Line]:
    """Return lines of which no two begin at the same x, moved by small factors."""
    results = [line for line in lines if not line.is_reference]
    xs = [x for line in results for x in line.points]
    step = max(2.0, max(xs) / min(xs)) ** (1 / 50)
    moved = []
    for line in lines:
        rivals = [other.label for other in results if min(other.points) == min(line.points)]
        place = rivals.index(line.label) - (len(rivals) - 1) / 2 if line in results else 0.0
        moved.append(replace(line, points={x * step**place: values for x, values in line.points.items()}))
    return moved


def _scale_by_factors(axes: Any, xs: list[float]) -> None:
    """Scale the x axis by factors, with plain numbers at a few points."""
    axes.set_xscale("log")
    apart: list[float] = []
    for x in xs:
        if not apart or x >= 1.15 * apart[-1]:
            apart.append(x)
    axes.set_xticks(apart, [f"{x:.4g}" for x in apart])
    axes.minorticks_off()


def _explain(drawing: Any, axes: list[Any]) -> None:
    """Draw one legend for all axes beside them, where it covers no line."""
    handles: dict[str, Any] = {}
    for diagram in axes:
        for handle, label in zip(*diagram.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = drawing.legend(
        list(handles.values()), list(handles), fontsize=8, loc="outside right upper", frameon=False
    )
    _take_literally(drawing)
    drawing.set_figwidth(drawing.get_figwidth() + legend.get_window_extent().width / drawing.dpi)


def _draw_line(axes: Any, line: Line, looks: dict[str, int]) -> None:
    """Draw the means over seeds, with a band of one standard deviation on both sides."""
    xs = sorted(line.points)
    means = [statistics.mean(line.points[x]) for x in xs]
    if line.is_reference and len(set(means)) == 1:
        axes.axhline(means[0], color="black", linestyle="--", linewidth=1, label=line.label)
        return
    if line.is_reference:
        axes.plot(xs, means, color="black", linestyle="--", linewidth=1, label=line.label)
        return
    look = looks.setdefault(line.label, len(looks))
    color, marker = COLORS[look % len(COLORS)], _MARKERS[(look + look // len(COLORS)) % len(_MARKERS)]
    style = ("-", ":", "-.")[look // len(COLORS) % 3]
    if len(xs) == 1:
        spread = statistics.stdev(line.points[xs[0]]) if len(line.points[xs[0]]) > 1 else None
        axes.errorbar(
            xs, means, spread, color=color, marker=marker, linestyle="", capsize=3, label=line.label
        )
        return
    axes.plot(xs, means, color=color, marker=marker, markersize=4, linestyle=style, label=line.label)
    if any(len(values) > 1 for values in line.points.values()):
        spreads = [statistics.stdev(v) if len(v := line.points[x]) > 1 else 0.0 for x in xs]
        low, high = ([mean + sign * s for mean, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)


def _take_literally(drawing: Any) -> None:
    """Draw all texts as they are written: a name with $ is not a formula."""
    for text in drawing.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
        text.set_text(encodable(text.get_text()))


def _saved(drawing: Any, suffix: str, salt: str) -> bytes:
    import matplotlib

    file = io.BytesIO()
    _take_literally(drawing)
    # Text stays text, and the salt is fixed: files are small, searchable, and equal in every process.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        drawing.savefig(file, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return file.getvalue()
