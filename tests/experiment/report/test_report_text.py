"""Whatever runs, folders and weights are called, a report of them is written and shows their names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from report_runs import Write

from nni_jackpot.experiment.report import plot, write_report
from nni_jackpot.experiment.report.figures import Figure, Line, Panel

NAMES = ["$x_$", "$\\frac{$", "<script>alert(1)", "a|b", "`a`", "```", "\x1b[31mred", "a&b", "ü"]


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_shows_any_name(name: str) -> None:
    pytest.importorskip("matplotlib")
    lines = [Line(name, {0.5: [1.0, 2.0], 0.9: [3.0]}), Line("dense", {0.5: [4.0]}, is_reference=True)]
    files = plot.draw(Figure("fig2", name, "sparsity %", name, [Panel(name, lines)]))
    assert files is not None
    assert files["png"].startswith(b"\x89PNG")
    assert b"<script>" not in files["svg"]


@pytest.mark.parametrize("name", ["$x_$ a|b", "<script>alert(1)|```", "\x1b[31m&", os.fsdecode(b"caf\xe9")])
def test_a_report_shows_any_name(name: str, write_run: Write, tmp_path: Path) -> None:
    for sparsity in (0.5, 0.9):
        for checkpoint in (f"{name}.pth", "other.pth"):
            write_run(f"{sparsity}-{checkpoint}", pretrain__checkpoint=checkpoint, ratio=sparsity)
    folder = (tmp_path / "runs").rename(tmp_path / name)
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yml").write_text("")
    write_report([folder], tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "\x1b" not in markdown + page
    assert "<script>" not in page
    assert ("\\|" in markdown) == ("|" in name)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows
    for row in rows:
        assert row.replace("\\|", "").count("|") in {
            other.count("|") for other in rows if "accuracy" in other
        }
        assert "<script>" not in row
