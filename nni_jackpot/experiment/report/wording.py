"""Names of rows, numbers as text, and the form of tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from prettytable import PrettyTable, TableStyle

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


def table_of(columns: Sequence[str], style: TableStyle = TableStyle.SINGLE_BORDER) -> PrettyTable:
    """Return an empty table: the first column on the left, numbers on the right."""
    table = PrettyTable(columns)
    table.set_style(style)
    table.align = "r"
    for first in columns[:1]:
        table.align[first] = "l"
    return table


def percent(share: float) -> str:
    """Return a fraction in percent, with all its digits."""
    return f"{100 * share:.10g} %"
