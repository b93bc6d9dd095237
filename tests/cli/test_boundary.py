"""However a command ends, there is an exit code for it and one line."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nni_jackpot import errors
from nni_jackpot.cli.boundary import Exit, way_out
from nni_jackpot.errors import JackpotError, SearchDivergedError, TrainingDivergedError
from nni_jackpot.experiment.tracking import Interrupted, Tracker


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, JackpotError)]
FAILURES = {SearchDivergedError, TrainingDivergedError}


@pytest.mark.parametrize("kind", KINDS)
def test_our_errors_are_a_line(kind: type[JackpotError], capsys: pytest.CaptureFixture[str]) -> None:
    code = way_out(raising(kind("no\nsuch \x1b[31mthing")))
    assert code == (Exit.FAILED if kind in FAILURES else Exit.REFUSED)
    assert capsys.readouterr() == ("", "nni-jackpot: error: no such \\x1b[31mthing\n")


def test_what_is_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert way_out(lambda: print("result")) == 0
    assert capsys.readouterr() == ("result\n", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), Exit.FAILED, "memory ran out: lower data.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), Exit.FAILED, "memory ran out"),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            Exit.FAILED,
            "a process that loads data was lost: run the same command to resume",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            Exit.FAILED,
            "a process that loads data was lost",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Exit.REFUSED, "No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9), Exit.REFUSED, "xxxxxxxxx"),
        (KeyError("x"), Exit.FAILED, "KeyError: 'x' (in test_boundary.py"),
        (AssertionError(), Exit.FAILED, "AssertionError: AssertionError"),
        (RecursionError("too deep"), Exit.FAILED, "please report it"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted: run the same command to resume"),
    ],
)
def test_other_errors_are_a_line_too(
    error: BaseException, code: Exit, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert way_out(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nni-jackpot: ")
    assert err.count("\n") == 1
    assert words.replace(" (in test_boundary.py", "") in err
    assert "Traceback" not in err


def test_memory_of_the_cpu_that_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert way_out(lambda: torch.empty(1 << 60)) == Exit.FAILED
    err = capsys.readouterr().err
    assert "memory ran out" in err
    assert err.count("\n") == 1


def test_the_traceback_is_there_for_who_wants_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNI_JACKPOT_DEBUG", "1")
    assert way_out(raising(KeyError("x"))) == Exit.FAILED
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("nni-jackpot: error: KeyError")


# -- signals


@pytest.fixture
def heeded() -> Iterator[None]:
    """Have Ctrl-C heeded, as in a terminal, and not ignored, as where a shell has the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, Exit.INTERRUPTED, "interrupted"),
        (signal.SIGTERM, Exit.TERMINATED, "terminated"),
    ],
)
def test_a_signal_tells_how_far_the_run_had_come(
    number: int, code: Exit, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def command() -> None:
        with Tracker(tmp_path, 9, description="search") as tracker:
            for _ in range(3):
                tracker.step(1.0)
            os.kill(os.getpid(), number)
            tracker.step(1.0)

    assert way_out(command) == code == 128 + number
    said = f"nni-jackpot: {word} at step 3 of 9 (search): run the same command to resume\n"
    assert capsys.readouterr().err == said
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_told_to_ignore_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert way_out(lambda: os.kill(os.getpid(), signal.SIGINT)) == Exit.DONE
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_within_another_keeps_the_first_words(tmp_path: Path) -> None:
    def command() -> None:
        with Tracker(tmp_path / "a", 9, description="a"), Tracker(tmp_path / "b", 5, description="b"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^at step 0 of 5 \(b\)$"):
        command()


# -- an output that takes nothing more


def with_stdout_to(file: str | int, monkeypatch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    stream = open(file, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = with_stdout_to(writing, monkeypatch)
    assert way_out(lambda: print("x" * 10**6)) == Exit.OUTPUT_CLOSED
    stream.close()  # says nothing either, as at the end of the interpreter
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_an_output_that_is_full(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    stream = with_stdout_to("/dev/full", monkeypatch)
    assert way_out(lambda: print("x")) == Exit.REFUSED
    stream.close()
    err = capfd.readouterr().err
    assert "No space left" in err
    assert err.count("\n") == 1
