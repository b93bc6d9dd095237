"""Interruption of runs, for tests with one process and for each of several processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from typing import Any
from unittest import mock

from nni_jackpot.cli import main
from nni_jackpot.experiment.tracking import Tracker


def interrupt() -> None:
    """Interrupt like Ctrl+C."""
    raise KeyboardInterrupt


def kill() -> None:
    """Die like kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopping(at: int, stop: Callable[[], None] = interrupt) -> Any:
    """Let a given step of a search or training be the last one in the block."""
    steps, take = count(1), Tracker.step

    def step(self: Tracker, *args: Any, **kwargs: Any) -> None:
        take(self, *args, **kwargs)
        if next(steps) == at:
            stop()

    return mock.patch.object(Tracker, "step", step)


if __name__ == "__main__":  # a search by a config, that is killed after so many steps
    with stopping(int(sys.argv[2]), kill):
        main(["search", sys.argv[1]])
