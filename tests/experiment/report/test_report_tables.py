from __future__ import annotations

from typing import Any

import pytest
from report_runs import Measures, Write

from nni_jackpot.experiment.report.measures import Measure
from nni_jackpot.experiment.report.tables import Table, tables


def table_of(measures: list[Measure], name: str) -> Table:
    return {table.name: table for table in tables(measures)}[name]


def test_table_1(write_run: Write, measures: Measures) -> None:
    for i, accuracy in enumerate((0.90, 0.91, 0.92)):
        write_run(
            f"90-{i}", accuracy, {"initial_tuned": 0.93, "jackpot_tuned": 0.94}, seed=i, finetune__epochs=4
        )
    for i, accuracy in enumerate((0.80, 0.84)):
        write_run(f"95-{i}", accuracy, seed=i, ratio=0.95)
    table = table_of(measures(), "table1")
    assert table.columns == ["accuracy %", "90 %", "95 %", "epochs", "seeds", "runs"]
    mixed = "3 at 90 %, 2 at 95 %"
    assert table.rows == [
        ["dense", "95.00 ± 0.00", "-", "-", "3", "3-5"],
        ["magnitude mask alone", "25.00 ± 0.00", "25.00 ± 0.00", "-", mixed, "1-5"],
        ["magnitude mask alone, norm re-estimated", "50.00 ± 0.00", "50.00 ± 0.00", "-", mixed, "1-5"],
        ["magnitude mask, weights tuned", "93.00 ± 0.00", "-", "4", "3", "1-3"],
        ["jackpot", "91.00 ± 1.00", "82.00 ± 2.83", "20", mixed, "1-5"],
        ["jackpot's mask, weights tuned", "94.00 ± 0.00", "-", "20 + 4", "3", "1-3"],
    ]


CIFAR = {"data__name": "cifar10", "model__depth": 32, "model__width": 32, "search__epochs": 30}


def test_the_paper_beside_the_same_rows(write_run: Write, measures: Measures) -> None:
    write_run("a", **CIFAR)
    write_run("b", **CIFAR, ratio=0.95)
    write_run("c", **CIFAR, ratio=0.98)
    random = {"pretrain__epochs": 0, "finetune__epochs": 160, "search__init": "snip"}
    write_run("d", 0.5, {"initial_tuned": 0.92}, **CIFAR, **random)
    write_run("e", 0.5, {"initial_tuned": 0.91}, **CIFAR, **random, model__init="kaiming")
    table = table_of(measures(), "table1")
    assert table.columns[:6] == ["accuracy %", "90 %", "paper, 90 %", "95 %", "paper, 95 %", "98 %"]
    printed = {row[0]: (row[2], row[4]) for row in table.rows if row[2] != "-"}
    assert printed == {
        "dense": ("94.62", "-"),
        "snip mask, weights tuned, random weights": ("92.59", "-"),
        "jackpot, from magnitude": ("93.71 ± 0.08", "92.92 ± 0.13"),
    }


@pytest.mark.parametrize(
    "other",
    [
        {"model__width": 16},
        {"model__depth": 20},
        {"data__name": "fashion_mnist"},
        {"data__train_images": 1000},
        {"data__validation_images": 1000},
        {"ratio": 0.91},
        {"search__epochs": 31},
        {"search__init": "snip"},
        {"pretrain__epochs": 0},
        {"search__method": "supermask"},
        {"model__init": "kaiming"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_no_number_of_the_paper_beside_another_row(
    write_run: Write, measures: Measures, other: dict[str, Any]
) -> None:
    write_run("a", **{**CIFAR, **other})
    (table,) = tables(measures())
    beside = [row[2] for row in table.rows if row[0].startswith("jackpot") and "paper, 90 %" in table.columns]
    assert set(beside) <= {"-"}


def test_tables_2_and_3_are_named_so(write_run: Write, measures: Measures) -> None:
    write_run("a", 0.6, data__name="cifar100", model={"name": "vgg19"}, search__epochs=160, ratio=0.95)
    (table,) = tables(measures())
    assert table.name == "table2"
    assert table.rows[-1][:3] == ["jackpot", "60.00", "72.95 ± 0.34"]


def test_table_4(write_run: Write, measures: Measures) -> None:
    for epochs in (0, 10, 30):
        write_run(f"{epochs}", 0.5 + epochs / 100, **{**CIFAR, "search__epochs": epochs})
    table = table_of(measures(), "table4")
    shape = ["", "sparsity", "epochs", "accuracy %", "overlap %", "paper, accuracy %", "paper, overlap %"]
    assert table.columns == [*shape, "seeds", "runs"]
    assert table.rows == [
        ["jackpot", "90 %", "0", "25.00", "100.00", "10.00 ± 0.01", "100.0", "1", "3"],
        ["jackpot", "90 %", "10", "60.00", "96.00", "93.02 ± 0.06", "97.9", "1", "2"],
        ["jackpot", "90 %", "30", "80.00", "96.00", "93.87 ± 0.09", "96.3", "1", "3"],
    ]
    assert "does not say of which sparsity" in table.note


def test_recipes_side_by_side(write_run: Write, measures: Measures) -> None:
    for seed, paper, ours in ((0, 0.80, 0.90), (1, 0.90, 0.96)):
        write_run(f"p{seed}", paper, seed=seed, search__recipe="paper")
        write_run(f"j{seed}", ours, seed=seed)
    write_run("j2", 0.2, seed=2)
    write_run("other", 0.2, search__recipe="paper", search__epochs=5)  # has nothing to stand beside
    table = table_of(measures(), "recipes")
    assert table.columns[3:6] == ["recipe paper %", "recipe default %", "gain"]
    seeds, runs = "2 at paper, 3 at default", "1-3, 5-6"
    assert table.rows == [
        ["jackpot", "90 %", "20", "85.00 ± 7.07", "68.67 ± 42.25", "8.00 ± 2.83", seeds, runs]
    ]
