"""Names of rows, and numbers as text."""

from __future__ import annotations

from collections.abc import Collection

from nni_jackpot.experiment.measures import Measured

# In the order of tables; {} is the criterion of the initial mask.
NAMES = {
    "dense": "dense",
    "initial": "{} mask alone",
    "initial_norm": "{} mask alone, norm re-estimated",
    "initial_tuned": "{} mask, weights tuned",
    "jackpot": "jackpot",
    "jackpot_tuned": "jackpot's mask, weights tuned",
}


def name_of(kind: str, init: str) -> str:
    """Return the name of a kind of row; comparators of other packages have the name of the kind."""
    return NAMES.get(kind, kind).format(init)


def spread(values: Collection[float]) -> str:
    """Return the mean of fractions in percent, with the standard deviation of a sample (n - 1) if n > 1."""
    return Measured("").spread(values)


def percent(share: float) -> str:
    """Return a fraction in percent, with all its digits."""
    return f"{100 * share:.10g} %"
