"""Progress display: a bar if stderr is a terminal, lines on stdout otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_LINE_EVERY = 30.0  # seconds between lines within an epoch


class Progress:
    """The progress of one phase of training.

    Rate and remaining time are estimated from the steps of this process.

    Parameters
    ----------
    description
        Name of the phase.
    total
        Number of steps of the phase.

    Attributes
    ----------
    steps
        Number of steps done, including the steps of an earlier process.
    """

    def __init__(self, description: str, total: int) -> None:
        self.steps = 0
        self._description = description
        self._total = total
        is_quiet = sys.stdout is None
        self._has_bar = not is_quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._first, self._began = 0, 0.0
        self._last_line = time.monotonic()

    def __str__(self) -> str:
        return f"step {self.steps} of {self._total}"

    @property
    def line_is_due(self) -> bool:
        """Whether the last line is at least half a minute old."""
        return time.monotonic() - self._last_line >= _LINE_EVERY

    def skip(self) -> None:
        """Count a step that an earlier process took."""
        self.steps += 1

    def step(self) -> None:
        """Count a step."""
        self.steps += 1
        if self._bar is not None:
            self._bar.update()
            return
        # The clock starts after the skipped steps and after the first step, which is slower than others.
        self._first, self._began = self.steps, time.monotonic()
        self._bar = tqdm(
            total=self._total,
            initial=self.steps,
            desc=self._description,
            unit="step",
            disable=not self._has_bar,
        )

    def show(self, values: Mapping[str, float], refresh: bool = False) -> None:
        """Show values next to the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=refresh)

    def line(self, values: Mapping[str, str]) -> None:
        """Print a line with values, unless there is a bar."""
        self._last_line = now = time.monotonic()
        if self._has_bar:
            return
        parts = [str(self), *(f"{name} {value}" for name, value in values.items())]
        if (steps := self.steps - self._first) and self._first and now > self._began:
            rate = steps / (now - self._began)
            left = tqdm.format_interval(max(0, self._total - self.steps) / rate)
            parts.append(f"{rate:.3g} steps/s, {left} left")
        print(f"{self._description}: {', '.join(parts)}", flush=True)

    def close(self) -> None:
        """Close the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()
