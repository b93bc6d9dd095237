"""Range coding of masks, close to the entropy of their zeros and ones.

The encoder has three steps, which the decoder reverses. A mask that is constant over blocks (channels,
kernels, any of NNI's granularities) is reduced to one cell per block. If N of every M consecutive cells are
kept (2:4), each group is one of C(M, N) symbols of equal probability. Otherwise every cell is a symbol, and
the number of ones gives the probability of a one: a quotient of two integers, so that all machines agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nni_jackpot.errors import MaskError
from nni_jackpot.storage.formats.coded_mask import GROUP_SIZES, CodedMask
from nni_jackpot.storage.formats.rules import Rule
from nni_jackpot.storage.formats.sealed import name_of

_queue, _model = constriction.stream.queue, constriction.stream.model

Bools = npt.NDArray[np.bool_]

DECODED = Rule(
    "the stream of a mask says as many ones as `ones`, and has no more than one word after the last block"
)

_SYMBOLS_AT_ONCE = 1 << 16  # the coder takes four bytes per symbol


def encode(mask: Tensor) -> CodedMask:
    """Encode a mask of zeros and ones, of any dtype and shape.

    Raises
    ------
    MaskError
        If the mask has other values.
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
        stream = _encode(_ranks(cells, group), _model.Uniform(math.comb(group[1], group[0])))
    elif 0 < ones < cells.size:
        stream = _encode(cells.reshape(-1), _biased(ones, cells.size))
    return CodedMask(name_of(mask.dtype), tuple(mask.shape), tuple(blocks), ones, group, stream)


def decode(coded: CodedMask) -> Tensor:
    """Decode a mask to a boolean tensor on the CPU.

    Raises
    ------
    TicketError
        If the stream does not match the description.
    """
    cells = np.full(coded.grid, coded.ones > 0) if not coded.stream else _decoded(coded)
    if max(coded.blocks, default=1) > 1:
        alone = [side for size in coded.grid for side in (size, 1)]
        spread = [side for pair in zip(coded.grid, coded.blocks, strict=True) for side in pair]
        cells = np.array(np.broadcast_to(cells.reshape(alone), spread), order="C").reshape(coded.shape)
    return torch.from_numpy(cells)


def check(coded: CodedMask) -> None:
    """Check that a mask can be decoded, using the memory of one piece only.

    Raises
    ------
    TicketError
        If the stream does not match the description.
    """
    for _ in _pieces(coded):
        pass


def _decoded(coded: CodedMask) -> Bools:
    """Return the cells of a mask with a stream."""
    flat, at = np.empty(coded.cells, dtype=bool), 0
    for piece in _pieces(coded):
        flat[at : at + piece.size] = piece
        at += piece.size
    if coded.group is None:
        return flat.reshape(coded.grid)
    dim = coded.group[2]
    across = (*coded.grid[:dim], *coded.grid[dim + 1 :], coded.grid[dim])
    return np.ascontiguousarray(np.moveaxis(flat.reshape(across), -1, dim))


def _pieces(coded: CodedMask) -> Iterator[Bools]:
    """Iterate over pieces of the cells, (n,), in coding order."""
    if not coded.stream:
        return
    if coded.group is None:
        count, distribution, patterns = coded.cells, _biased(coded.ones, coded.cells), None
    else:
        keep, size, _ = coded.group
        count, distribution = coded.cells // size, _model.Uniform(math.comb(size, keep))
        patterns = _patterns(keep, size)
    decoder = _queue.RangeDecoder(np.frombuffer(coded.stream, "<u4").astype(np.uint32))
    ones = 0
    for at in range(0, count, _SYMBOLS_AT_ONCE):
        try:
            symbols = decoder.decode(distribution, min(_SYMBOLS_AT_ONCE, count - at))
        except AssertionError:  # the library's error for words that no encoder writes
            raise DECODED.broken("a stream of other words than a coder's") from None
        piece = symbols.astype(bool) if patterns is None else patterns[symbols].reshape(-1)
        ones += int(np.count_nonzero(piece))
        yield piece
    if ones != coded.ones or not decoder.maybe_exhausted():
        raise DECODED.broken(f"a stream of {ones} ones, or more, for a mask that keeps {coded.ones} blocks")


def _block_along(cells: Bools, dim: int) -> int:
    """Return the largest block size that divides a dimension such that slices within a block are equal."""
    across = np.moveaxis(cells, dim, 0)
    block = len(across)
    for i in range(1, len(across)):
        if block == 1:
            break
        if i % block and not np.array_equal(across[i], across[i - 1]):
            block = math.gcd(block, i)
    return max(block, 1)


def _group_of(cells: Bools, ones: int) -> tuple[int, int, int] | None:
    """Return ``(N, M, dim)`` with the smallest M such that the mask keeps N of every M, or None."""
    for size in GROUP_SIZES:
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
    """Return all ways to keep ``keep`` of ``size`` cells, one per row, ordered as little-endian numbers."""
    numbers = np.arange(1 << size, dtype="<u2")
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(-1, 8).sum(axis=1, dtype=np.uint8)
    numbers = numbers[ones[numbers & 255] + ones[numbers >> 8] == keep]
    bits = np.unpackbits(numbers.view(np.uint8).reshape(-1, 2), axis=1, count=size, bitorder="little")
    return bits.view(bool)


def _ranks(cells: Bools, group: tuple[int, int, int]) -> npt.NDArray[np.int32]:
    """Return the row of `_patterns` that equals each group."""
    keep, size, dim = group
    bits = np.int32(1) << np.arange(size, dtype=np.int32)
    patterns = _patterns(keep, size)
    rank_of = np.zeros(1 << size, dtype=np.int32)
    rank_of[patterns @ bits] = np.arange(len(patterns), dtype=np.int32)
    numbers = np.zeros(cells.size // size, dtype=np.int32)
    for bit, column in zip(bits, _in_groups(cells, size, dim).T, strict=True):
        numbers += bit * column
    return rank_of[numbers]


def _biased(ones: int, count: int) -> Any:
    return _model.Bernoulli(ones / count, perfect=False)


def _encode(symbols: npt.NDArray[Any], distribution: Any) -> bytes:
    encoder = _queue.RangeEncoder()
    for at in range(0, symbols.size, _SYMBOLS_AT_ONCE):
        encoder.encode(symbols[at : at + _SYMBOLS_AT_ONCE].astype(np.int32), distribution)
    return encoder.get_compressed().astype("<u4").tobytes()
