"""A run that is interrupted: for tests of one process, and for each of several."""

from __future__ import annotations

from itertools import count
from typing import Any
from unittest import mock

from nni_jackpot.tracking import Tracker


def stopping(at: int) -> Any:
    """Have a step of the search end with an interruption, in the block."""
    steps, take = count(1), Tracker.step

    def step(self: Tracker, *args: Any, **kwargs: Any) -> None:
        take(self, *args, **kwargs)
        if next(steps) == at:
            raise KeyboardInterrupt

    return mock.patch.object(Tracker, "step", step)
