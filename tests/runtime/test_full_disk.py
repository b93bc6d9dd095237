"""A full disk gives one line and an exit code; the same command resumes when there is space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import command, outcome, write_file

from nni_jackpot import cli
from nni_jackpot.errors import OutputFolderError
from nni_jackpot.experiment.tracking import Tracker


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let the system refuse to write files larger than a number of bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 2000, 20_000])
def test_a_run_ends_in_one_line_and_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    (tmp_path / "alone").mkdir()
    assert command("search", write_file(tmp_path / "alone")) == 0
    file = write_file(tmp_path)
    capsys.readouterr()
    with no_file_above(size):
        assert command("search", file) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("nni-jackpot: error: cannot write ")
    assert said.endswith(": File too large\n")
    assert not list(tmp_path.rglob("*.part"))
    assert command("search", file) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "alone" / "out")


def test_a_finished_run_stays_where_there_is_no_room_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path)
    assert command("search", file) == 0
    before = outcome(tmp_path / "out")
    with no_file_above(2000):
        assert command("search", file, "search.epochs=1", flags=("--overwrite",)) == 2
    after = outcome(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_a_report_is_whole_or_the_one_that_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("search", write_file(tmp_path)) == 0
    line = ["report", str(tmp_path / "out"), "-o", str(tmp_path / "report")]
    with no_file_above(1000):
        assert cli.main(line) == 2
    assert not (tmp_path / "report").exists()
    assert cli.main(line) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert command("search", tmp_path / "run.yml", "seed=1", f"output={tmp_path}/out/other") == 0
    with no_file_above(1000):
        assert cli.main(line) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_metrics_do_not_wait_for_room(tmp_path: Path) -> None:
    """TensorboardX's writer blocked forever once its queue was full."""

    def take_steps() -> None:
        with Tracker(tmp_path, 2000, description="search", log_every=1) as tracker:
            for _ in range(2000):
                tracker.step(1.0)
            tracker.epoch(0.5)

    with no_file_above(500), pytest.raises(OutputFolderError, match="File too large"):
        take_steps()
