"""What is said of a coded mask, and the rules that hold of it before anything is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nni_jackpot.storage.formats.rules import Rule, are_naturals, is_natural
from nni_jackpot.storage.formats.sealed import DTYPES

GROUP_SIZES = (2, 4, 8, 16)
MOST_WEIGHTS = 1 << 32  # beyond the largest layers there are
_MOST_SIDES = 16
_SPARE = 8  # bytes; the last words of the coder

DESCRIPTION = Rule(
    "a mask is an object of `dtype`, `shape` and `ones`, and of `blocks` and `group` where there are any"
)
DTYPE = Rule(f"`dtype` is one of {', '.join(DTYPES)}")
NUMBERS = Rule(
    "`shape`, `blocks` and `group` are lists of whole numbers from 0 to 2^63 - 1, `ones` is one such"
)
SHAPE = Rule("`shape` has at most 16 sides, whose product is at most 2^32, a side of 0 taken for 1")
BLOCKS = Rule("`blocks` has a number for every side: a divisor of the side, and 1 for a side of 0")
ONES = Rule("`ones` is no more than the number of blocks")
STREAM = Rule(
    "a stream is there if some blocks are kept and others are not; it is of whole 32-bit words, and has "
    "no more than 1.01 bits a block and 8 bytes"
)
GROUP = Rule(
    "`group` is `[N, M, dim]` with 0 < N < M, M one of 2, 4, 8 and 16 that divides the number of blocks "
    "along `dim`, and `ones` N of every M blocks"
)

RULES = (DESCRIPTION, DTYPE, NUMBERS, SHAPE, BLOCKS, ONES, STREAM, GROUP)


@dataclass(frozen=True)
class CodedMask:
    """A mask of one target, coded.

    Attributes
    ----------
    dtype
        Of the mask, ``float32``.
    shape
        Of the mask.
    blocks
        Size of a block along each dimension, 1 where single weights differ.
    ones
        How many blocks are kept.
    group
        ``(N, M, dim)`` if of every M blocks in a row along ``dim`` exactly N are kept; None otherwise.
    stream
        Words of the range coder, little-endian; empty if all blocks are alike.

    Raises
    ------
    TicketError
        If they break a rule, as only those of a damaged file do.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    ones: int
    group: tuple[int, int, int] | None
    stream: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise DTYPE.broken(f"a mask of type {self.dtype!r}")
        lists = (self.shape, self.blocks, self.group or ())
        if not (all(map(are_naturals, lists)) and is_natural(self.ones)):
            raise NUMBERS.broken(f"a mask with {self.ones!r} ones and the numbers {lists!r}")
        sides = [max(side, 1) for side in self.shape]
        if len(sides) > _MOST_SIDES or math.prod(sides) > MOST_WEIGHTS:
            raise SHAPE.broken(f"a mask of shape {list(self.shape)}")
        if len(self.blocks) != len(sides) or any(
            block == 0 or side % block for side, block in zip(sides, self.blocks, strict=True)
        ):
            raise BLOCKS.broken(f"blocks of {list(self.blocks)} in a mask of shape {list(self.shape)}")
        if self.ones > self.cells:
            raise ONES.broken(f"{self.ones} of {self.cells} blocks of a mask")
        size = len(self.stream)
        if size % 4 or (not size) != (self.ones in (0, self.cells)) or size > 1.01 * self.cells / 8 + _SPARE:
            raise STREAM.broken(f"{size} bytes for a mask that keeps {self.ones} of {self.cells} blocks")
        if self.group is not None and not self._has_group(*self.group):
            raise GROUP.broken(f"{list(self.group)} for {self.ones} ones in {list(self.grid)} blocks")

    def _has_group(self, *group: int) -> bool:
        if len(group) != 3:
            return False
        keep, size, dim = group
        return (
            size in GROUP_SIZES
            and 0 < keep < size
            and dim < len(self.grid)
            and self.grid[dim] % size == 0
            and self.ones * size == keep * self.cells
        )

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each dimension."""
        return tuple(size // block for size, block in zip(self.shape, self.blocks, strict=True))

    @property
    def size(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)

    @property
    def cells(self) -> int:
        """How many blocks there are."""
        return math.prod(self.shape) // math.prod(self.blocks)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return self.ones * math.prod(self.blocks)

    @property
    def bound(self) -> float:
        """Entropy in bytes of as many independent cells, each a one with the same probability."""
        rates = [
            count / self.cells for count in (self.ones, self.cells - self.ones) if 0 < count < self.cells
        ]
        return -self.cells * sum(rate * math.log2(rate) for rate in rates) / 8

    def describe(self) -> dict[str, Any]:
        """Return all but the stream as plain values."""
        blocks = list(self.blocks) if any(block > 1 for block in self.blocks) else None
        described = {"dtype": self.dtype, "shape": list(self.shape), "ones": self.ones}
        described |= {"blocks": blocks, "group": self.group}
        return {key: value for key, value in described.items() if value is not None}

    @classmethod
    def described(cls, description: Any, stream: bytes) -> CodedMask:
        """Return the mask of a description and a stream.

        Raises
        ------
        TicketError
            If they make no mask.
        """
        needed, possible = {"dtype", "shape", "ones"}, {"blocks", "group"}
        if not isinstance(description, dict) or not needed <= description.keys() <= needed | possible:
            raise DESCRIPTION.broken("a mask")
        shape = description["shape"]
        lists = [shape, description.get("blocks", []), description.get("group", [])]
        if not all(isinstance(numbers, list | tuple) for numbers in lists):
            raise NUMBERS.broken(f"a mask with the numbers {lists!r}")
        blocks = tuple(description.get("blocks", [1] * len(shape)))
        group = tuple(description["group"]) if "group" in description else None
        return cls(description["dtype"], tuple(shape), blocks, description["ones"], group, stream)
