from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import Write

from nni_jackpot import cli
from nni_jackpot.errors import (
    CheckpointError,
    ExperimentConfigError,
    JackpotError,
    OutputFolderError,
    RunFolderError,
)
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.report import summary, write_report
from nni_jackpot.experiment.report.measures import measure
from nni_jackpot.experiment.report.runs import find_runs
from nni_jackpot.experiment.run import search
from nni_jackpot.masking.methods.edge_popup import EdgePopup
from nni_jackpot.runtime.extras import install_command


@pytest.fixture
def runs(write_run: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some runs of two networks, with a folder whose name means something in HTML."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        for ratio in (0.5, 0.9):
            write_run(f"<b>/{seed}-{ratio}", 0.9 + seed / 100, seed=seed, ratio=ratio)
    write_run("wide", 0.95, model__width=32, search__epochs=3)
    return Path("runs")


def test_one_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (runs / "<b>" / "0-0.5" / "results.json").unlink()
    assert cli.main(["report", str(runs), "-o", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "read 4 runs, passed over 1",
        "  runs/<b>/0-0.5: no results.json: unfinished, failed, or only pre-trained",
        "written to out: index.html, report.md, tables: 2 (CSV), figures: 1 (CSV, PNG, SVG)",
    ]
    narrow, wide = "resnet-8-of-width-16-on-digits", "resnet-8-of-width-32-on-digits"
    assert {path.name for path in Path("out").iterdir()} == {
        "index.html",
        "report.md",
        f"{narrow}-table1.csv",
        f"{wide}-table1.csv",
        *(f"{narrow}-fig3.{suffix}" for suffix in ("csv", "png", "svg")),
    }
    markdown = Path("out/report.md").read_text()
    assert markdown.count("\n## ") == 3
    assert "nni-jackpot report runs -o out\n" in markdown
    assert "1. <a id=\"run-1\"></a>`nni-jackpot search 'runs/<b>/0-0.9/config.yml'`\n" in markdown
    runs_of_the_row = "[1](#run-1)-[3](#run-3)"
    cells = ["jackpot", "91.00", "90.50 ± 0.71", "20", "1 at 50 %, 2 at 90 %", runs_of_the_row]
    assert f"| {' | '.join(cells)} |" in re.sub(" +", " ", markdown)
    links = re.findall(r"\]\((.+?)\)", markdown)
    assert all(f'<a id="{link[1:]}">' in markdown for link in links if link.startswith("#"))
    for file in (link for link in links if not link.startswith("#")):
        assert (Path("out") / file).stat().st_size


def test_the_csv_files_have_every_number(runs: Path) -> None:
    write_report([runs], Path("out"))
    with Path("out/resnet-8-of-width-16-on-digits-table1.csv").open(newline="") as file:
        lines = {(line["kind"], line["sparsity %"]): line for line in csv.DictReader(file)}
    line = lines["jackpot", "90.0"]
    assert (line["accuracy %"], line["standard deviation"], line["n"]) == ("90.5", "0.7071", "2")
    assert (line["overlap %"], line["seeds"], line["epochs"]) == ("96.0", "0 1", "20")
    commands = [f"nni-jackpot search 'runs/<b>/{seed}-0.9/config.yml'" for seed in (0, 1)]
    assert line["commands"].split("; ") == commands
    settings = json.loads(line["settings"])
    assert (settings["search.recipe"], settings["search.lr"]) == ("default", EdgePopup().lr)
    assert lines["dense", "0.0"]["overlap %"] == ""
    with Path("out/resnet-8-of-width-16-on-digits-fig3.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    assert points[0] == {
        "panel": "as they are",
        "line": "magnitude mask alone",
        "sparsity %": "50.0",
        "test accuracy %": "25.0",
        "standard deviation": "0.0",
        "n": "2",
    }


def test_the_page_is_one_file(runs: Path, write_run: Write) -> None:
    pytest.importorskip("matplotlib")
    write_run("wide-too", model__width=32, search__epochs=3, ratio=0.95)
    write_report([runs], Path("out"))
    page = Path("out/index.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "runs/&lt;b&gt;/0-0.5/config.yml" in page
    assert page.count("<svg") == 2
    # All that is referred to is in the page itself, or a CSV file beside it.
    identifiers = re.findall(r' id="(.+?)"', page)
    assert len(identifiers) == len(set(identifiers))
    used = set(re.findall(r'href="(.+?)"', page)) | set(re.findall(r"url\((.+?)\)", page))
    inside = {name.removeprefix("#") for name in used if name.startswith("#")}
    assert inside
    assert inside <= set(identifiers)
    beside = {name for name in used if not name.startswith("#")}
    assert beside == {path.name for path in Path("out").glob("*.csv")}


def test_the_same_runs_make_the_same_files(runs: Path) -> None:
    write_report([runs], Path("out"))
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    write_report([runs], Path("out"))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_without_matplotlib(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_report([runs], Path("out"))
    assert text.splitlines()[-1] == f"figures need matplotlib: {install_command('plot')}"
    assert {path.suffix for path in Path("out").iterdir()} == {".html", ".md", ".csv"}
    assert ".svg" not in Path("out/report.md").read_text()


def test_many_that_are_passed_over_fit_on_a_screen(runs: Path, write_run: Write) -> None:
    for i in range(30):
        (write_run(f"failed/{i}", seed=i) / "results.json").unlink()
    text = write_report([runs], Path("out"))
    assert len(text.splitlines()) < 20
    assert "and 18 more, see report.md" in text
    assert Path("out/report.md").read_text().count("no results.json") == 30


def test_what_a_search_leaves_is_what_a_report_reads(tmp_path: Path, write_run: Write) -> None:
    overrides = {
        "output": str(tmp_path / "real"),
        "device": "cpu",
        "model.width": 4,
        "pretrain.epochs": 1,
        "pretrain.cache": str(tmp_path / "cache"),
        "search.epochs": 2,
        "finetune.epochs": 1,
        "finetune.under": "both",
    }
    result = search(load_config(write_run("template") / "config.yml", overrides))
    (run,) = find_runs([tmp_path / "real"]).runs
    assert list(run.rows.values()) == result.rows
    assert (run.overlap, run.folder, list(run.curve)) == (result.overlap, result.folder, [1, 2])
    jackpot = next(one for one in measure([run]) if one.kind == "jackpot")
    assert (jackpot.sparsity, jackpot.epochs) == (0.9, 2)


# -- what is wrong with the input


def spoil(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


def spoil_row(key: str, value: object) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        content = json.loads((run / "results.json").read_text())
        content["rows"][-1][key] = value
        (run / "results.json").write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (spoil("results.json", '{"rows": ['), RunFolderError, "results.json is not that of a run"),
        (spoil("results.json", "[]"), RunFolderError, "results.json"),
        (
            spoil("results.json", '{"rows": [], "overlap": 1}'),
            RunFolderError,
            "no row of kind dense, initial",
        ),
        (spoil_row("accuracy", 90.0), RunFolderError, "results.json.*accuracy and sparsity in"),
        (spoil_row("accuracy", float("nan")), RunFolderError, "results.json.*accuracy and sparsity in"),
        (spoil_row("accuracy", "0.9"), RunFolderError, "results.json"),
        (spoil_row("kind", "champion"), RunFolderError, "results.json.*'champion', allowed: dense, "),
        (spoil_row("name", "jackpot"), RunFolderError, "results.json.*name"),
        (spoil("metrics.csv", "epoch,accuracy\n1,high\n"), RunFolderError, "metrics.csv.*high"),
        (spoil("config.yml", "search: {epoch: 1}"), ExperimentConfigError, "config.yml"),
    ],
)
def test_damaged_files(
    runs: Path, change: Callable[[Path], object], error: type[JackpotError], words: str
) -> None:
    change(runs / "wide")
    with pytest.raises(error, match=f"wide.*{words}"):
        write_report([runs], Path("out"))
    assert not Path("out").exists()


def test_damaged_masks(write_run: Write, tmp_path: Path) -> None:
    for init in ("magnitude", "random"):
        for ratio in (0.5, 0.9):
            folder = write_run(f"{init}-{ratio}", ratio=ratio, search__init=init)
            for name in ("start.pth", "masks.pth"):
                (folder / name).write_text("no masks")
    with pytest.raises(CheckpointError, match=r"start.pth is not a mask file"):
        write_report([tmp_path / "runs"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["runs/wide/config.yml"], "config.yml is not a folder"),
        (["runs", "empty"], "empty holds no finished run"),
    ],
)
def test_one_line_says_what_is_wrong(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("empty").mkdir()
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not Path("report").exists()


def test_a_folder_that_cannot_be_written(runs: Path) -> None:
    Path("out").write_text("a file")
    with pytest.raises(OutputFolderError, match="out"):
        write_report([runs], Path("out"))


# -- one screen after a search


def test_summary_names_the_criterion() -> None:
    kinds = ["dense", "initial", "initial_norm", "jackpot", "initial_tuned", "jackpot_tuned"]
    results = [
        Result([Row(kind, 0.9 + i / 100, 0.9, 3) for kind in kinds], 0.95, 1.0, Path("out")) for i in range(2)
    ]
    lines = summary(results, "snip").splitlines()
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names == [
        "",
        "dense",
        "snip mask alone",
        "snip mask alone, norm re-estimated",
        "jackpot",
        "snip mask, weights tuned",
        "jackpot's mask, weights tuned",
    ]
    assert "90.50 ± 0.71" in lines[3]
