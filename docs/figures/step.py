"""Draw docs/figures/step.svg: one step of a search, for docs/architecture.md.

Run it with: python docs/figures/step.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

LOOP, SEARCH, MASKING = "#FCE8D5", "#D9ECF8", "#DDF2E3"
WIDTH, HEIGHT = 3.0, 1.3
# Left edge, lower edge, colour, title, what happens.
BOXES = [
    (0.0, 2.4, LOOP, "1  forward", "every reader of a weight\ngets mask * weight"),
    (3.8, 2.4, LOOP, "2  backward", "straight-through gradient\nof each score (Eq. 6)"),
    (7.6, 2.4, SEARCH, "3  schedule", "learning rate, number of zeros,\ntemperature and budgets"),
    (7.6, 0.0, SEARCH, "4  optimizer", "SGD moves the scores;\nweights have no gradient"),
    (3.8, 0.0, MASKING, "5  refresh", "the mask keeps the k grains\nof largest score, exactly"),
    (0.0, 0.0, MASKING, "6  cache", "masked weights are rewritten\nwhere the mask changed"),
]


def main() -> None:
    """Draw the boxes, the arrows from each to the next, and a legend of who does what."""
    figure = Figure(figsize=(8.6, 3.7), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for left, low, colour, title, text in BOXES:
        axes.add_patch(
            FancyBboxPatch((left, low), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.12", fc=colour, ec="0.3")
        )
        axes.text(left + 0.15, low + HEIGHT - 0.15, title, va="top", weight="bold", size=10)
        axes.text(left + 0.15, low + 0.15, text, va="bottom", size=9)
    middle = HEIGHT / 2
    for start, end in (
        ((3.0, 2.4 + middle), (3.8, 2.4 + middle)),
        ((6.8, 2.4 + middle), (7.6, 2.4 + middle)),
        ((9.1, 2.4), (9.1, HEIGHT)),
        ((7.6, middle), (6.8, middle)),
        ((3.8, middle), (3.0, middle)),
        ((1.5, HEIGHT), (1.5, 2.4)),
    ):
        arrow(axes, start, end)
    axes.text(1.65, 1.85, "next batch", va="center", size=9)
    axes.text(7.2, 3.15, "step()", va="bottom", ha="center", size=9, family="monospace")
    for left, colour, text in (
        (0.0, LOOP, "training loop: NNI's evaluator or your own"),
        (5.3, SEARCH, "wing search"),
        (7.6, MASKING, "wing masking"),
    ):
        axes.add_patch(FancyBboxPatch((left, -0.85), 0.3, 0.3, "square,pad=0", fc=colour, ec="0.3"))
        axes.text(left + 0.45, -0.7, text, va="center", size=9)
    axes.set(xlim=(-0.1, 10.7), ylim=(-1.0, 3.8))
    axes.axis("off")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "step"}):  # the same bytes each time
        figure.savefig(Path(__file__).with_suffix(".svg"), format="svg", metadata={"Date": None})


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two boxes."""
    style = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main()
