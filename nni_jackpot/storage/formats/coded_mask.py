"""A coded mask with its description, and the rules that are checked before it is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nni_jackpot.storage.formats.rules import Rule, are_naturals, is_natural
from nni_jackpot.storage.formats.sealed import DTYPES

GROUP_SIZES = (2, 4, 8, 16)
MOST_WEIGHTS = 1 << 32  # more than the largest existing layers have
_MOST_SIDES = 16
_SPARE = 8  # bytes for the coder's last words

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
    """The coded mask of one target.

    Attributes
    ----------
    dtype
        Dtype of the mask: ``float32``.
    shape
        Shape of the mask.
    blocks
        Block size along each dimension; 1 if single weights differ.
    ones
        Number of kept blocks.
    group
        ``(N, M, dim)`` if exactly N of every M consecutive blocks along ``dim`` are kept; None otherwise.
    stream
        Words of the range coder, little-endian; empty if all blocks are equal.

    Raises
    ------
    TicketError
        If the attributes break a rule; only a damaged file does.
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
        """Number of blocks along each dimension."""
        return tuple(size // block for size, block in zip(self.shape, self.blocks, strict=True))

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def cells(self) -> int:
        """Number of blocks."""
        return math.prod(self.shape) // math.prod(self.blocks)

    @property
    def kept(self) -> int:
        """Number of kept weights."""
        return self.ones * math.prod(self.blocks)

    @property
    def bound(self) -> float:
        """Entropy in bytes of ``cells`` independent bits that are one with probability ``ones / cells``."""
        rates = [
            count / self.cells for count in (self.ones, self.cells - self.ones) if 0 < count < self.cells
        ]
        return -self.cells * sum(rate * math.log2(rate) for rate in rates) / 8

    def describe(self) -> dict[str, Any]:
        """Return all attributes except the stream as plain values."""
        blocks = list(self.blocks) if any(block > 1 for block in self.blocks) else None
        described = {"dtype": self.dtype, "shape": list(self.shape), "ones": self.ones}
        described |= {"blocks": blocks, "group": self.group}
        return {key: value for key, value in described.items() if value is not None}

    @classmethod
    def described(cls, description: Any, stream: bytes) -> CodedMask:
        """Create the mask from its description and its stream.

        Raises
        ------
        TicketError
            If they break a rule.
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
