"""The learning rate over a search whose length is given in steps or in epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(progress: float) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: from 1 to 0 along half a cosine (Sec. 4.1)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class SearchClock:
    """Tells how far a search has come, from the steps it has taken.

    Parameters
    ----------
    max_steps
        Length of the search in optimizer steps, if that is known.
    max_epochs
        Length in epochs, used where the steps are not known. The length of an epoch is then learned in the
        first one, throughout which the progress is 0.
    """

    max_steps: int | None
    max_epochs: int | None
    step: int = 0
    _epoch: int = -1
    _epoch_start: int = 0
    _epoch_length: int | None = None

    def begin_epoch(self) -> None:
        """Note that the steps from here on belong to the next epoch."""
        if self._epoch >= 0:
            self._epoch_length = self.step - self._epoch_start
        self._epoch += 1
        self._epoch_start = self.step

    def progress(self) -> float:
        """Return the share of the search that is done, in [0, 1]."""
        if self.max_steps is not None:
            return min(1.0, self.step / self.max_steps)
        if not self._epoch_length or not self.max_epochs:
            return 0.0
        within = min(1.0, (self.step - self._epoch_start) / self._epoch_length)
        return min(1.0, (self._epoch + within) / self.max_epochs)
