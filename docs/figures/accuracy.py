"""Draw docs/figures/accuracy.svg, the README's figure, from the committed results of Table 1.

Run it with: python docs/figures/accuracy.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
RESULTS = DOCS / "results" / "all-images" / "resnet-8-of-width-16-on-fashion-mnist-table1.csv"
# Kind and recipe in the results, label, colour. The results call the default recipe by its former name.
SERIES = [
    ("jackpot", "jackpot", "jackpot, default recipe: no weight changed", "#0072B2"),
    ("jackpot", "paper", "jackpot, the paper's recipe: no weight changed", "#56B4E9"),
    ("initial_tuned", "", "magnitude mask, all kept weights trained", "#D55E00"),
]


def main() -> None:
    """Draw one panel for each sparsity: accuracy against the epochs of search or training."""
    rows = list(csv.DictReader(RESULTS.read_text(encoding="utf-8").splitlines()))
    [dense] = [float(row["accuracy %"]) for row in rows if row["kind"] == "dense"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, sparsity in zip(panels, (90.0, 95.0), strict=True):
        axes.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense network")
        for kind, recipe, label, colour in SERIES:
            points = sorted(
                (int(row["epochs"]), float(row["accuracy %"]), float(row["standard deviation"]))
                for row in rows
                if (row["kind"], row["recipe"], float(row["sparsity %"])) == (kind, recipe, sparsity)
            )
            epochs, accuracies, deviations = zip(*points, strict=True)
            axes.errorbar(epochs, accuracies, deviations, label=label, color=colour, marker="o", capsize=3)
        axes.set(
            title=f"{sparsity:.0f} % of the weights are zero", xlabel="epochs", xticks=[1, 3], xlim=(0.6, 3.4)
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "accuracy"}
    ):  # the same bytes each time
        figure.savefig(Path(__file__).with_suffix(".svg"), format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
