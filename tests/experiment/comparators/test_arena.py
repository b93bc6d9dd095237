"""All methods in one small run, as in configs/digits/arena.yml, and their report."""

from __future__ import annotations

from pathlib import Path

from tiny_runs import command, write_file

from nni_jackpot import cli
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.training import TRAINING_METHODS


def test_all_methods_run_side_by_side(tmp_path: Path) -> None:
    settings = {name: {"epochs": 1, "lr": 0.05} for name in TRAINING_METHODS}
    settings["lt"] |= {"rounds": 2}
    file = write_file(tmp_path, comparators=settings)
    assert command("search", file) == 0
    rows = {row.kind: row for row in load_result(tmp_path / "out").rows}
    assert rows.keys() >= {"jackpot", "initial_tuned", "jackpot_tuned", *TRAINING_METHODS}
    assert {row.sparsity for kind, row in rows.items() if kind != "dense"} == {rows["jackpot"].sparsity}
    assert rows["lt"].total_epochs == 3
    assert all(rows[name].weights_changed for name in TRAINING_METHODS)
    assert not rows["jackpot"].weights_changed
    assert cli.main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    methods = report.split("### Methods and their costs")[1].split("###")[0]
    assert len([line for line in methods.splitlines() if line.startswith("| ")]) >= 1 + 1 + 16
