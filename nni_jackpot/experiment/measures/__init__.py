"""The measures of a network: names, directions, and their values as text."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A measure.

    Attributes
    ----------
    words
        Column title of a table.
    is_percent
        Whether values are fractions, shown in percent.
    most
        Largest possible value; None if there is none.
    least
        Smallest possible value.
    lower_is_better
        Whether smaller values are better.
    """

    words: str
    is_percent: bool = True
    most: float | None = 1.0
    least: float = 0.0
    lower_is_better: bool = False

    def spread(self, values: Collection[float]) -> str:
        """Return the mean, with the standard deviation of a sample (n - 1) if there are several values."""
        scale, digits = (100, 2) if self.is_percent else (1, 2 if self.most is None else 4)
        mean = f"{scale * statistics.mean(values):.{digits}f}"
        return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"

    def is_possible(self, value: object) -> bool:
        """Return True if a value is a number in the range of the measure."""
        if not isinstance(value, int | float):
            return False
        return self.least <= value and (self.most is None or value <= self.most)


MEASURES: dict[str, Measured] = {
    "accuracy": Measured("test accuracy %"),
    "top5": Measured("top-5 accuracy %"),
    "perplexity": Measured(
        "perplexity (lower is better)", is_percent=False, most=None, least=1.0, lower_is_better=True
    ),
    "agreement": Measured("same class as dense %"),
    "cosine": Measured("cosine to dense", is_percent=False, most=1.0001, least=-1.0001),
    "neighbour": Measured("same nearest neighbour %"),
}
