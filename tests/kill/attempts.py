"""A command in a separate process with a planned end; not a test.

The process is forked from one that has loaded everything, so that a run of half a second takes no longer.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_jackpot import cli

# The events of Python's audit hooks that change files; hooks run before the change.
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Fate = Callable[[], None]


@dataclass(frozen=True)
class End:
    """The end of a process.

    Attributes
    ----------
    code
        Its exit code; the negative number of the signal that ended it.
    said
        Its output to stderr.
    """

    code: int
    said: str


class Attempt:
    """A running command.

    Parameters
    ----------
    arguments
        Command line arguments.
    fate
        Function that prepares the planned end, called in the process before the command.
    """

    def __init__(self, arguments: list[str], fate: Fate | None = None) -> None:
        reader, writer = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            os.close(reader)
            os._exit(_run(arguments, fate, writer))
        os.close(writer)
        self._stderr = os.fdopen(reader, errors="replace")

    def send(self, number: signal.Signals, after: float) -> End:
        """Send a signal after some seconds, and wait for the end."""
        time.sleep(after)
        os.kill(self._process, number)  # also to a process that has ended, which is not reaped yet
        return self.wait()

    def wait(self) -> End:
        """Wait for the end."""
        with self._stderr:
            said = self._stderr.read()
        _, status = os.waitpid(self._process, 0)
        return End(os.waitstatus_to_exitcode(status), said)


def _run(arguments: list[str], fate: Fate | None, stderr: int) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background processes
    try:
        if fate is not None:
            fate()
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


def at_event(root: Path, number: int, act: Callable[[str], None]) -> Fate:
    """Return the fate that acts before the n-th change of a file below a folder, and before all later changes."""

    def prepare() -> None:
        seen = 0

        def hear(event: str, values: tuple[Any, ...]) -> None:
            nonlocal seen
            if _is_change(event, values) and _is_below(root, values[0]):
                seen += 1
                if seen >= number:
                    act(event)

        sys.addaudithook(hear)

    return prepare


def _is_change(event: str, values: tuple[Any, ...]) -> bool:
    return bool(values[2] & _WRITING) if event == "open" else event in _CHANGES


def _is_below(root: Path, place: object) -> bool:
    if isinstance(place, int):  # an open file
        return False
    return os.path.abspath(os.fsdecode(place)).startswith(str(root))  # type: ignore[arg-type]


def kill(event: str) -> None:
    """Die like kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(event: str) -> None:
    """Simulate a full disk for changes that need space."""
    if event in ("open", "os.mkdir", "os.rename"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_file_above(size: int) -> Fate:
    """Return the fate that limits files to a size in bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def events_of(root: Path, arguments: list[str]) -> int:
    """Return the number of changes of files below a folder that a successful command makes."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    end = Attempt(arguments, at_event(root, 1, lambda event: os.write(writer, b"x") and None)).wait()
    os.close(writer)
    if end.code != 0:
        raise RuntimeError(f"{arguments} ended with {end.code}: {end.said}")
    with os.fdopen(reader, "rb") as file:
        return len(file.read())
