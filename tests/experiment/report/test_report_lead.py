"""The sentence and the picture that a report leads with, and the table of costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import Measures, Write

from nni_jackpot.experiment.report import plot
from nni_jackpot.experiment.report.figures import Figure, Line, Panel
from nni_jackpot.experiment.report.lead.picture import picture
from nni_jackpot.experiment.report.lead.sentence import sentence
from nni_jackpot.experiment.report.measures import labels
from nni_jackpot.experiment.report.tables import by_cost

TUNED = {"finetune__epochs": 5}


def record(folder: Path, **numbers: Any) -> None:
    """Give the rows of a run what newer runs record."""
    content = json.loads((folder / "results.json").read_text())
    for row in content["rows"]:
        row |= {"total_epochs": 30 + row["epochs"], "seconds": 2.5, "peak_memory_bytes": 2**20} | numbers
    (folder / "results.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("tuned", "first"), [(0.80, "the jackpot"), (0.95, "magnitude mask, weights tuned")])
@pytest.mark.parametrize(("spread", "words"), [(0.001, "more than"), (0.2, "within")])
def test_one_sentence_names_the_best(
    tuned: float, first: str, spread: float, words: str, write_run: Write, measures: Measures
) -> None:
    for seed in (0, 1):
        rows = {"initial_tuned": tuned - seed * spread}
        write_run(f"{seed}", 0.9 - seed * spread, rows, seed=seed, **TUNED)
    text = sentence(measures())
    assert text.startswith(f"At 90 % sparsity, {first} is the best of 4 methods")
    assert f"{words} one standard deviation" in text
    assert text.endswith(".")
    assert "\n" not in text


def test_single_runs_are_called_so(write_run: Write, measures: Measures) -> None:
    write_run("a", 0.9, {"initial_tuned": 0.95}, **TUNED)
    assert "5.00 less in a comparison of single runs" in sentence(measures())


def test_a_point_for_each_method_that_trains(write_run: Write, measures: Measures) -> None:
    record(write_run("a", 0.9, {"initial_tuned": 0.95}, **TUNED))
    figure = picture(measures())
    assert figure is not None
    assert figure.is_log
    points = {line.label: line.points for line in figure.panels[0].lines if not line.is_reference}
    assert points == {"magnitude mask, weights tuned": {35: [95.0]}, "jackpot": {50: [90.0]}}


def test_no_picture_of_one_method(write_run: Write, measures: Measures) -> None:
    write_run("a", 0.9)
    assert picture(measures()) is None


def test_what_a_run_did_not_record_is_an_empty_cell(write_run: Write, measures: Measures) -> None:
    write_run("old", 0.8, ratio=0.5)
    record(write_run("new", 0.9), weights_changed=False, overlap=0.5)
    table = by_cost(measures())
    assert table is not None
    cells = {(row[0], row[2]): row[3:8] for row in table.rows}
    assert cells["jackpot", "90 %"] == ["50", "2.5", "1", "50.0", "no"]
    assert cells["jackpot", "50 %"] == ["", "", "", "", ""]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_no_table_of_costs_for_older_runs(write_run: Write, measures: Measures) -> None:
    write_run("old")
    assert by_cost(measures()) is None


def test_names_tell_granularities_apart(write_run: Write, measures: Measures) -> None:
    entry = {"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 0}
    write_run("weights", config_list=[entry])
    write_run("channels", config_list=[{**entry, "granularity": "out_channel"}])
    found = labels([one for one in measures() if one.kind == "jackpot"])
    assert sorted(found) == ["jackpot", "jackpot, granularity out_channel"]


@pytest.mark.parametrize("methods", [2, 20])
def test_no_legend_on_the_axes(methods: int) -> None:
    pytest.importorskip("matplotlib")
    drawing, axes = plot.blank() or (None, [])
    lines = [Line(f"method {i}", {20.0: [90.0 + i / 10]}) for i in range(methods)]
    figure = Figure("cost", "", "epochs", "accuracy", [Panel("", lines)], is_log=True)
    assert plot.draw(figure) is not None
    axes[0].plot([1], [1], label="a")
    plot._explain(drawing, axes)
    drawing.canvas.draw()
    assert axes[0].get_legend() is None
    legend, inside = drawing.legends[0].get_window_extent(), axes[0].get_window_extent()
    assert not legend.overlaps(inside)
