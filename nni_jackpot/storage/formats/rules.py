"""Rules of file formats: the text of each is on the page of a format, and in messages about files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nni_jackpot.errors import TicketError
from nni_jackpot.runtime.terminal import escaped

_MOST_NATURAL = (1 << 63) - 1  # torch's own
_MOST_SIDES, _MOST_NUMBERS = 64, 1 << 60


@dataclass(frozen=True)
class Rule:
    """A rule of a format.

    Attributes
    ----------
    text
        What holds in every file of the format, in one sentence.
    """

    text: str

    def broken(self, where: str) -> TicketError:
        """Return the error of a file that breaks the rule, ``where`` being the part of the file that does."""
        return TicketError(f"{escaped(where)}: {self.text}")


@contextmanager
def saying(prefix: str) -> Iterator[None]:
    """Say which file it is in the message of any TicketError from within."""
    try:
        yield
    except TicketError as error:
        raise TicketError(f"{prefix}: {error}") from None


def is_natural(value: Any) -> bool:
    """Tell whether a value is a whole number of 63 bits, 0 included; a boolean is none."""
    return type(value) is int and 0 <= value <= _MOST_NATURAL


def are_naturals(values: Any) -> bool:
    """Tell whether a value is a list or a tuple of natural numbers."""
    return isinstance(values, list | tuple) and all(map(is_natural, values))


def is_shape(values: Any) -> bool:
    """Tell whether a tensor can have this shape: few sides, whose product is bounded beside a 0 as well."""
    return (
        are_naturals(values)
        and len(values) <= _MOST_SIDES
        and math.prod(max(side, 1) for side in values) <= _MOST_NUMBERS
    )
