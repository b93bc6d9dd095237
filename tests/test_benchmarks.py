"""The benchmarks run, on next to nothing; what they measure there means nothing."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
OTHERS = ["originals", "photographs", "revisions", "start_and_end", "startup"]
SCRIPTS = ["step", "selection", "ranking", "memory", "growth", "deployment", "ticket", "fuzz_tickets"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(name: str, *arguments: object) -> list[list[str]]:
        """Run a benchmark and return the cells of its table, without the header."""
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        output = capsys.readouterr().out
        assert f"python benchmarks/{name}.py --smoke" in output
        assert "PyTorch" in output
        rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|")]
        assert {len(row) for row in rows} == {len(rows[0])}
        return rows[2:]

    return run


def test_step(run) -> None:
    for options, count in [
        ((), 6),
        (("--amp", "--channels-last"), 5),
        (("--contestants", "dense training"), 1),
    ]:
        rows = run("step", *options)
        assert len({row[1] for row in rows}) == len(rows) == count
        assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[2:])


def test_selection(run) -> None:
    for row in run("selection"):
        assert all(float(cell.split()[0]) > 0 for cell in row[5:])


def test_ranking(run) -> None:
    for row in run("ranking"):
        assert float(row[4]) > 0
        assert row[5] == "0"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_growth(run) -> None:
    for row, way in zip(run("growth"), ("whole", "block by block"), strict=True):
        assert row[1] == way
        assert float(row[2].split()[0]) > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory(run) -> None:
    contestants = [row[0].split(", ")[1] for row in run("memory")]
    assert contestants == ["forward and backward", "dense training", "paper's recipe"]


def test_deployment(run) -> None:
    for library in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(library)
    rows = run("deployment")
    assert [row[1] for row in rows] == ["dense"] * 5 + ["95%"] * 5
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[3:8])
    exact = ("PyTorch", "onnxruntime", "OpenVINO")
    for kind in ("dense", "95%"):
        found = [float(row[8].rstrip("%")) for row in rows if row[1] == kind and row[2] in exact]
        assert len(found) == 3
        assert max(found) - min(found) < 0.5  # one image of 360, if its two best logits are as good as equal


def test_ticket(run) -> None:
    (row,) = run("ticket")
    assert row[0] == "tiny, 90%"


def test_fuzz_tickets(run) -> None:
    *_, total = run("fuzz_tickets")
    assert sum(map(int, total[1:4])) == 200
    assert total[4:] == ["0", "0"]


def test_photographs(run) -> None:
    for library in ("timm", "sklearn", "matplotlib"):  # the last two carry three photographs
        pytest.importorskip(library)
    rows = run("photographs", "--backgrounds", "none")
    assert [row[1] for row in rows] == [
        "dense",
        "dense, norm re-estimated",
        "magnitude",
        "magnitude, norm re-estimated",
        "jackpot from magnitude",
        "wanda",
        "wanda, norm re-estimated",
        "jackpot from wanda",
    ]
    assert rows[0][2:6] == ["100.0%", "0.000"] * 2
    rows = run("photographs", "--backgrounds", "none", "--criteria", "wanda", "--norm", "freeze")
    assert [row[1] for row in rows[2:]] == ["wanda", "jackpot from wanda, norm frozen"]


def test_start_and_end(run) -> None:
    pytest.importorskip("sklearn")
    rows = run("start_and_end")
    assert [row[0] for row in rows] == ["batch norm"] * 3 + ["no norm"] * 3 + ["transformer"] * 3
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])


def test_saved_into_the_page(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / PAGE.name
    shutil.copy(PAGE, page)
    rows = run("ranking", "--save", page)
    first = page.read_text(encoding="utf-8")
    begin, end = (first.index(f"<!-- ranking:{which} -->") for which in ("begin", "end"))
    assert all(begin < first.index(f"| {row[0]} | {row[1]} | {row[2]} |") < end for row in rows)
    image = tmp_path / re.search(r"!\[ranking\]\((.*)\)", first[begin:end])[1]
    assert image.stat().st_size < 100_000
    run("ranking", "--save", page)
    again = page.read_text(encoding="utf-8")
    assert len(again.splitlines()) == len(first.splitlines())


def test_what_cannot_be_saved_is_said_before_anything_is_measured(run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run("step", "--save", page)


def test_revisions() -> None:
    line = [sys.executable, str(BENCHMARKS / "revisions.py"), "--smoke", "--old", str(ROOT)]
    output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    row = output.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "resnet18"
    assert all(float(cell.split()[0]) > 0 for cell in row[1:])


def test_every_benchmark_is_run_here_and_has_its_place() -> None:
    assert sorted([*SCRIPTS, *OTHERS]) == sorted(
        p.stem for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()
    )
    pages = (PAGE, PAGE.with_name("deployment.md"), PAGE.with_name("tickets.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in [name + device for name in SCRIPTS for device in ("", "-cuda")]:
        if name not in ("ranking-cuda", "growth-cuda", "deployment-cuda", "ticket-cuda", "fuzz_tickets-cuda"):
            assert text.index(f"<!-- {name}:begin -->") < text.index(f"<!-- {name}:end -->")
