"""A mask as few bytes: range coded at the entropy of its zeros and ones.

Three steps, each of which the decoder takes back. A mask that is constant over blocks (channels, kernels, any
of NNI's granularities) shrinks to one cell a block. If of every M cells in a row N are kept (2:4), each such
group is one of C(M, N) symbols of equal probability. Else every cell is a symbol, and the number of ones
gives the probability of a one: by a division of two integers, so that all machines code alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nni_jackpot.errors import MaskError, TicketError
from nni_jackpot.sealed import DTYPES, name_of

_queue, _model = constriction.stream.queue, constriction.stream.model

Bools = npt.NDArray[np.bool_]

_SYMBOLS_AT_ONCE = 1 << 20  # the coder takes four bytes a symbol
_GROUP_SIZES = (2, 4, 8, 16)
# Far beyond the largest layers there are; a file that claims more is not believed.
MOST_WEIGHTS = 1 << 33
_MOST_DIMS = 16


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
        If the numbers contradict each other, as only those of a damaged file do.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    ones: int
    group: tuple[int, int, int] | None
    stream: bytes

    def __post_init__(self) -> None:
        numbers = (*self.shape, *self.blocks, self.ones, *(self.group or ()))
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TicketError("a mask is described by other things than natural numbers")
        if self.dtype not in DTYPES:
            raise TicketError(f"there is no mask of type {self.dtype}")
        if len(self.shape) > _MOST_DIMS or math.prod(max(size, 1) for size in self.shape) > MOST_WEIGHTS:
            raise TicketError(f"a mask of shape {str(list(self.shape))[:80]} is larger than any layer")
        if len(self.blocks) != len(self.shape) or any(
            block == 0 or size % block for size, block in zip(self.shape, self.blocks, strict=True)
        ):
            raise TicketError(f"blocks of {list(self.blocks)} do not tile a shape of {list(self.shape)}")
        if self.ones > self.cells:
            raise TicketError(f"{self.ones} of {self.cells} blocks of a mask cannot be kept")
        if len(self.stream) % 4 or (not self.stream) != (self.ones in (0, self.cells)):
            raise TicketError(
                f"a mask that keeps {self.ones} of {self.cells} does not take {len(self.stream)} bytes"
            )
        if self.group is not None:
            _check_group(self.group, self.grid, self.ones)

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
    def described(cls, description: dict[str, Any], stream: bytes) -> CodedMask:
        """Return the mask of a description and a stream.

        Raises
        ------
        TicketError
            If they make no mask.
        """
        try:
            shape = tuple(description["shape"])
            blocks = tuple(description.get("blocks", [1] * len(shape)))
            group = tuple(description["group"]) if "group" in description else None
            return cls(description["dtype"], shape, blocks, description["ones"], group, stream)
        except TicketError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TicketError(f"no description of a mask: {str(description)[:80]}") from None


def encode(mask: Tensor) -> CodedMask:
    """Code a mask of zeros and ones, of any type and shape.

    Raises
    ------
    MaskError
        If it has other values.
    """
    kept = mask.detach().bool()
    if mask.dtype != torch.bool and not torch.equal(mask == 1, kept):
        raise MaskError("a mask holds values other than 0 and 1")
    cells: Bools = kept.cpu().numpy()
    blocks = []
    for dim in range(cells.ndim):
        blocks.append(_block_along(cells, dim))
        cells = cells[(slice(None),) * dim + (slice(None, None, blocks[-1]),)]
    ones = int(np.count_nonzero(cells))
    group = _group_of(cells, ones)
    stream = b""
    if group is not None:
        stream = _encode(_ranks(cells, group), _any_of(math.comb(group[1], group[0])))
    elif 0 < ones < cells.size:
        stream = _encode(cells.reshape(-1), _biased(ones, cells.size))
    return CodedMask(name_of(mask.dtype), tuple(mask.shape), tuple(blocks), ones, group, stream)


def decode(coded: CodedMask) -> Tensor:
    """Return the mask, boolean, on the CPU.

    Raises
    ------
    TicketError
        If the stream is not that of such a mask.
    """
    if not coded.stream:
        cells = np.full(coded.grid, coded.ones > 0)
    elif coded.group is None:
        cells = _decode(coded.stream, _biased(coded.ones, coded.cells), coded.cells, np.bool_)
        cells = cells.reshape(coded.grid)
    else:
        keep, size, _ = coded.group
        ranks = _decode(coded.stream, _any_of(math.comb(size, keep)), coded.cells // size, np.int32)
        cells = _of_ranks(ranks, coded.group, coded.grid)
    if np.count_nonzero(cells) != coded.ones:
        raise TicketError(f"a mask keeps {np.count_nonzero(cells)} blocks, not {coded.ones} as is said of it")
    for dim, block in enumerate(coded.blocks):
        if block > 1:
            cells = np.repeat(cells, block, axis=dim)
    return torch.from_numpy(cells)


def _check_group(group: tuple[int, int, int], grid: tuple[int, ...], ones: int) -> None:
    keep, size, dim = group
    if not (
        size in _GROUP_SIZES
        and 0 < keep < size
        and dim < len(grid)
        and grid[dim] % size == 0
        and ones * size == keep * math.prod(grid)
    ):
        raise TicketError(f"{keep} of {size} along dimension {dim} does not fit {ones} ones in {list(grid)}")


def _block_along(cells: Bools, dim: int) -> int:
    """Return the largest size of blocks that tile a dimension and within which slices are equal."""
    across = np.moveaxis(cells, dim, 0)
    block = len(across)
    for i in range(1, len(across)):
        if block == 1:
            break
        if i % block and not np.array_equal(across[i], across[i - 1]):
            block = math.gcd(block, i)
    return max(block, 1)


def _group_of(cells: Bools, ones: int) -> tuple[int, int, int] | None:
    """Return N, M and the dimension if a mask keeps N of every M; of several, the smallest M."""
    for size in _GROUP_SIZES:
        keep, rest = divmod(ones * size, max(1, cells.size))
        if rest or not 0 < keep < size:
            continue
        for dim in range(cells.ndim):
            if cells.shape[dim] % size == 0 and (_in_groups(cells, size, dim).sum(axis=1) == keep).all():
                return keep, size, dim
    return None


def _in_groups(cells: Bools, size: int, dim: int) -> Bools:
    return np.moveaxis(cells, dim, -1).reshape(-1, size)


def _patterns(keep: int, size: int) -> Bools:
    """Return all ways to keep so many of a group, one a row, in the order of their numbers."""
    numbers = np.array([number for number in range(1 << size) if number.bit_count() == keep])
    return (numbers[:, None] >> np.arange(size) & 1).astype(bool)


def _ranks(cells: Bools, group: tuple[int, int, int]) -> npt.NDArray[np.int32]:
    """Return the row that each group has among all patterns."""
    keep, size, dim = group
    bits = np.int32(1) << np.arange(size, dtype=np.int32)
    patterns = _patterns(keep, size)
    rank_of = np.zeros(1 << size, dtype=np.int32)
    rank_of[patterns @ bits] = np.arange(len(patterns), dtype=np.int32)
    numbers = np.zeros(cells.size // size, dtype=np.int32)
    for bit, column in zip(bits, _in_groups(cells, size, dim).T, strict=True):
        numbers += bit * column
    return rank_of[numbers]


def _of_ranks(ranks: npt.NDArray[np.int32], group: tuple[int, int, int], grid: tuple[int, ...]) -> Bools:
    """Take `_ranks` back."""
    keep, size, dim = group
    across = np.moveaxis(np.empty(grid, dtype=bool), dim, -1)
    cells = _patterns(keep, size)[ranks].reshape(across.shape)
    return np.ascontiguousarray(np.moveaxis(cells, -1, dim))


def _biased(ones: int, count: int) -> Any:
    return _model.Bernoulli(ones / count, perfect=False)


def _any_of(count: int) -> Any:
    return _model.Uniform(count)


def _encode(symbols: npt.NDArray[Any], distribution: Any) -> bytes:
    encoder = _queue.RangeEncoder()
    for at in range(0, symbols.size, _SYMBOLS_AT_ONCE):
        encoder.encode(symbols[at : at + _SYMBOLS_AT_ONCE].astype(np.int32), distribution)
    return encoder.get_compressed().astype("<u4").tobytes()


def _decode(stream: bytes, distribution: Any, count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    decoder = _queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))
    symbols = np.empty(count, dtype)
    for at in range(0, count, _SYMBOLS_AT_ONCE):
        at_once = min(_SYMBOLS_AT_ONCE, count - at)
        try:
            symbols[at : at + at_once] = decoder.decode(distribution, at_once)
        except AssertionError:  # which is what the library raises for words that no encoder writes
            raise TicketError("the stream of a mask is damaged") from None
    if not decoder.maybe_exhausted():
        raise TicketError("the stream of a mask goes on after its end")
    return symbols
