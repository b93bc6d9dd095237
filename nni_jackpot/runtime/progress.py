"""How far work has come, as people see it: a bar where stderr is a terminal, lines on stdout elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_LINE_EVERY = 30.0  # seconds, where an epoch takes longer


class Progress:
    """The progress of a phase of training, whose rate and time left are those of the steps of this process.

    Parameters
    ----------
    description
        Name of the phase.
    total
        Steps of the whole phase.

    Attributes
    ----------
    steps
        How far it has come, the steps of an earlier process included.
    """

    def __init__(self, description: str, total: int) -> None:
        self.steps = 0
        self._description = description
        self._total = total
        self._has_bar = sys.stderr is not None and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._first, self._began = 0, 0.0
        self._last_line = time.monotonic()

    def __str__(self) -> str:
        return f"step {self.steps} of {self._total}"

    @property
    def line_is_due(self) -> bool:
        """Whether there has been no line for half a minute."""
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
        # Time begins after the first step, which is slower than others, and after those that were skipped.
        self._first, self._began = self.steps, time.monotonic()
        self._bar = tqdm(
            total=self._total,
            initial=self.steps,
            desc=self._description,
            unit="step",
            disable=not self._has_bar,
        )

    def show(self, values: Mapping[str, float], refresh: bool = False) -> None:
        """Put values beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=refresh)

    def line(self, values: Mapping[str, str]) -> None:
        """Print a line with values, where there is no bar."""
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
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
