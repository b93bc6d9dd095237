"""Rules of file formats; the documentation of a format and the error messages show their texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nni_jackpot.errors import TicketError
from nni_jackpot.runtime.terminal import escaped

_MOST_NATURAL = (1 << 63) - 1  # torch's limit
_MOST_SIDES, _MOST_NUMBERS = 64, 1 << 60


@dataclass(frozen=True)
class Rule:
    """A rule of a format.

    Attributes
    ----------
    text
        A sentence that is true for every file of the format.
    """

    text: str

    def broken(self, where: str) -> TicketError:
        """Return the error for a file that breaks the rule; ``where`` names the part of the file."""
        return TicketError(f"{escaped(where)}: {self.text}")


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Prefix the message of any TicketError in the block, such as with the name of the file."""
    try:
        yield
    except TicketError as error:
        raise TicketError(f"{prefix}: {error}") from None


def is_natural(value: Any) -> bool:
    """Return True if a value is an integer from 0 to 2^63 - 1; a bool is not."""
    return type(value) is int and 0 <= value <= _MOST_NATURAL


def are_naturals(values: Any) -> bool:
    """Return True if a value is a list or a tuple of natural numbers."""
    return isinstance(values, list | tuple) and all(map(is_natural, values))


def is_shape(values: Any) -> bool:
    """Return True if a tensor can have this shape; the bound on its size takes a side of 0 for 1."""
    return (
        are_naturals(values)
        and len(values) <= _MOST_SIDES
        and math.prod(max(side, 1) for side in values) <= _MOST_NUMBERS
    )
