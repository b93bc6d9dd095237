"""The end of a command: an exit code, and one line that says what to do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from nni_jackpot.errors import Interrupted, JackpotError, SearchDivergedError, TrainingDivergedError
from nni_jackpot.runtime.terminal import one_line

_DEBUG = "NNI_JACKPOT_DEBUG"
_SIGNALS = signal.SIGINT, signal.SIGTERM


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    INTERRUPTED = 128 + signal.SIGINT
    OUTPUT_CLOSED = 128 + 13  # SIGPIPE, which not every system has
    TERMINATED = 128 + signal.SIGTERM


EXIT_CODES = f"""\
exit codes:
  {Exit.DONE:<5}done
  {Exit.FAILED:<5}the run failed: the loss diverged, memory ran out, a process was lost, or a defect was met
  {Exit.REFUSED:<5}the command, a file or this machine is not valid; the line says what would be right
  {Exit.INTERRUPTED:<5}interrupted (Ctrl-C)
  {Exit.OUTPUT_CLOSED:<5}the reader of the output has closed it
  {Exit.TERMINATED:<5}terminated (SIGTERM)

{_DEBUG}=1 in the environment shows where in the code an error comes from."""


def way_out(command: Callable[[], object]) -> Exit:
    """Run a command, and return its exit code; print one line on stderr unless it succeeded."""
    received: list[int] = []
    with _stopped_by_signals(received):
        try:
            command()
            sys.stdout.flush()
            return Exit.DONE
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(_DEBUG):
                traceback.print_exc()
            code, line = _verdict(error, received)
        _drop_what_cannot_be_written()
        if line:
            with suppress(OSError):
                print(f"nni-jackpot: {one_line(line)}", file=sys.stderr, flush=True)
        return code


def _verdict(error: BaseException, received: list[int]) -> tuple[Exit, str]:
    """Return the exit code and the line for an error."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        code = Exit.TERMINATED if signal.SIGTERM in received else Exit.INTERRUPTED
        where = f" {error}" if isinstance(error, Interrupted) else ""
        return code, f"{code.name.lower()}{where}: run the same command to resume"
    if isinstance(error, BrokenPipeError):
        return Exit.OUTPUT_CLOSED, ""
    if isinstance(error, SearchDivergedError | TrainingDivergedError):
        return Exit.FAILED, f"error: {text}"
    if isinstance(error, JackpotError):
        return Exit.REFUSED, f"error: {text}"
    # PyTorch's error by its name: the command line does not import PyTorch to find out.
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text
    if isinstance(error, MemoryError) or is_torchs:
        wanted = "lower data.batch_size, data.eval_batch_size or data.workers, or take a smaller network"
        return Exit.FAILED, f"error: memory ran out: {wanted} ({text.splitlines()[0]})"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        remedy = "run the same command to resume; fewer data.workers need less memory"
        return Exit.FAILED, f"error: a process that loads data was lost: {remedy} ({text})"
    if isinstance(error, OSError):
        return Exit.REFUSED, f"error: {text}"
    kind, place = type(error).__name__, _place(error)
    return Exit.FAILED, (
        f"error: {kind}: {text}{place}: this is a defect; please report it to the maintainers of "
        f"nni-jackpot, with the output under {_DEBUG}=1 in the environment"
    )


def _place(error: BaseException) -> str:
    """Return the place in this package where an error was raised."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "nni_jackpot" in frame.filename]
    return f" (in {os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""


@contextmanager
def _stopped_by_signals(received: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt for the first Ctrl-C or SIGTERM; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        for each in heard:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread can set signal handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number in _SIGNALS if before[number] != signal.SIG_IGN]  # as under nohup
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number] or signal.SIG_DFL)


def _drop_what_cannot_be_written() -> None:
    """Discard unwritten output, so that the interpreter does not report a closed pipe or full disk again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
