from __future__ import annotations

import pytest
import torch
from report_runs import Measures, Write

from nni_jackpot import mask_overlap, save_masks
from nni_jackpot.experiment.report.figures import Figure, figures
from nni_jackpot.experiment.report.measures import Measure


def figure_of(measures: list[Measure], name: str) -> Figure:
    return {figure.name: figure for figure in figures(measures)}[name]


def test_figures_are_only_those_that_runs_are_there_for(write_run: Write, measures: Measures) -> None:
    write_run("a")
    assert figures(measures()) == []
    write_run("b", ratio=0.95)
    assert [figure.name for figure in figures(measures())] == ["fig3"]


def test_figures_2_3_and_7(write_run: Write, measures: Measures) -> None:
    for ratio in (0.5, 0.95):
        for seed in (0, 1):
            name, accuracy = f"{ratio}-{seed}", 0.9 + seed / 50
            write_run(
                f"m{name}", accuracy, {"jackpot_tuned": 0.94}, seed=seed, ratio=ratio, finetune__epochs=4
            )
            write_run(f"s{name}", 0.7, seed=seed, ratio=ratio, search__init="snip")
            write_run(f"r{name}", 0.4, seed=seed, ratio=ratio, pretrain__epochs=0)
    jackpot = {50.0: [90.0, 92.0], 95.0: [90.0, 92.0]}
    (panel,) = figure_of(measures(), "fig2").panels
    assert [line.label for line in panel.lines] == ["jackpot", "jackpot, random weights", "dense"]
    assert panel.lines[0].points == {x: pytest.approx(values) for x, values in jackpot.items()}
    assert panel.lines[1].points == {50.0: [40.0, 40.0], 95.0: [40.0, 40.0]}
    assert [line.is_reference for line in panel.lines] == [False, False, True]
    (panel,) = figure_of(measures(), "fig7").panels
    assert [line.label for line in panel.lines] == ["jackpot", "jackpot's mask, weights tuned", "dense"]
    alone, norm = figure_of(measures(), "fig3").panels
    names = ["magnitude mask alone", "snip mask alone", "jackpot", "dense"]
    assert [[line.label for line in panel.lines] for panel in (alone, norm)] == [names, names]
    assert alone.lines[0].points[95.0] == [25.0, 25.0]
    assert norm.lines[0].points[95.0] == [50.0, 50.0]


def test_figure_4(write_run: Write, measures: Measures) -> None:
    generator = torch.Generator().manual_seed(0)
    expected: dict[tuple[str, str, float], float] = {}
    for ratio in (0.5, 0.75):
        masks = {}
        for init in ("magnitude", "random"):
            folder = write_run(f"{init}-{ratio}", ratio=ratio, search__init=init)
            masks[init] = [
                {"conv": {"weight": (torch.rand(100, generator=generator) > ratio).float()}} for _ in range(2)
            ]
            save_masks(masks[init][0], folder / "start.pth")
            save_masks(masks[init][1], folder / "masks.pth")
        for mask, (start, _) in masks.items():
            for jackpot, (_, found) in masks.items():
                expected[jackpot, mask, 100 * ratio] = 100 * mask_overlap(start, found).total
    figure = figure_of(measures(), "fig4")
    assert [panel.title for panel in figure.panels] == ["jackpot, from magnitude", "jackpot, from random"]
    points = {
        (panel.title.split()[-1], line.label.split()[0], x): values[0]
        for panel in figure.panels
        for line in panel.lines
        if not line.is_reference
        for x, values in line.points.items()
    }
    assert points == pytest.approx(expected)
    assert figure.panels[0].lines[-1].points == {50.0: [50.0], 75.0: [62.5]}  # by chance


def test_figure_5(write_run: Write, measures: Measures) -> None:
    for init, accuracy in (("magnitude", 0.9), ("grasp", 0.8)):
        for seed in (0, 1):
            write_run(f"{init}-{seed}", accuracy + seed / 100, seed=seed, search__init=init, search__epochs=2)
    (panel,) = figure_of(measures(), "fig5").panels
    assert panel.title == "jackpot, 90 % sparsity"
    assert [line.label for line in panel.lines] == ["from magnitude", "from grasp", "dense"]
    assert panel.lines[0].points == {1: pytest.approx([80.0, 81.0]), 2: pytest.approx([85.0, 86.0])}


def test_figure_6(write_run: Write, measures: Measures) -> None:
    for ratio in (0.5, 0.95):
        for method, accuracy in (("edge_popup", 0.9), ("supermask", 0.8)):
            write_run(f"pretrained-{method}-{ratio}", accuracy, ratio=ratio, search__method=method)
            for init in (None, "kaiming", "signed_constant"):
                settings = {"pretrain__epochs": 0, "model__init": init, "search__method": method}
                write_run(f"{init}-{method}-{ratio}", accuracy - 0.4, ratio=ratio, **settings)
        write_run(f"paper-{ratio}", ratio=ratio, search__recipe="paper")  # has nothing to stand beside
    (panel,) = figure_of(measures(), "fig6").panels
    assert [line.label for line in panel.lines] == [
        "jackpot, by edge_popup",
        "jackpot, by supermask",
        "jackpot, random weights, by edge_popup",
        "jackpot, random weights, by supermask",
        "jackpot, random kaiming weights, by edge_popup",
        "jackpot, random kaiming weights, by supermask",
        "jackpot, random signed constant weights, by edge_popup",
        "jackpot, random signed constant weights, by supermask",
        "dense",
    ]
    assert panel.lines[1].points == {50.0: [80.0], 95.0: [80.0]}
    assert panel.lines[-2].points == {50.0: [pytest.approx(40.0)], 95.0: [pytest.approx(40.0)]}
    # Others show the paper's search alone.
    assert len(figure_of(measures(), "fig2").panels[0].lines) == 6
    assert len(figure_of(measures(), "fig3").panels[0].lines) == 4
