"""Progress is shown with and without a terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.runtime.progress import Progress


class Clock:
    """A clock that only moves on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_line_has_the_rate_and_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("search", 101)
    for _ in range(11):
        progress.step()
        clock.now += 2
    progress.line({"loss": "0.5000"})
    assert capsys.readouterr().out == "search: step 11 of 101, loss 0.5000, 0.455 steps/s, 03:18 left\n"


def test_what_was_skipped_is_not_counted_for_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("search", 1000)
    for _ in range(900):
        progress.skip()
    clock.now += 50
    for _ in range(11):
        progress.step()
        clock.now += 1
    progress.line({})
    assert capsys.readouterr().out == "search: step 911 of 1000, 0.909 steps/s, 01:37 left\n"


def test_there_is_a_line_every_half_minute(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, 100, description="search") as tracker:
        for _ in range(100):
            clock.now += 4
            tracker.step(0.25)
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"search: step (\d+) of 100, loss 0.2500", line).group(1) for line in lines] == [
        str(step) for step in range(8, 101, 8)
    ]


def test_a_bar_begins_where_a_resumed_run_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("search", 1000)
    for _ in range(900):
        progress.skip()
    progress.step()
    bar = progress._bar
    assert bar is not None
    assert (bar.n, bar.initial) == (901, 901)
    progress.step()
    assert bar.n == 902
    progress.line({"loss": "1"})
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "902/1000" in err
