"""Compression of tensors by byte planes: the first bytes of all numbers, then all second bytes, and so on.

Neighbouring numbers have similar exponents and unrelated mantissas. Stored apart, the exponents compress.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.runtime.tensor_bytes import as_bytes, from_bytes
from nni_jackpot.storage.formats.rules import Rule, is_shape
from nni_jackpot.storage.formats.sealed import DTYPES, name_of

FORM = Rule(
    "the type of a statistic is one that masks can have, and its shape one that tensors of the file can have"
)
PACKED = Rule("packed tensors inflate to the bytes of their types and shapes, and end there")

_MOST_DEFLATED = 1032  # zlib's highest compression ratio
_PIECE = 1 << 12  # bytes of input per step; zlib copies what it has not consumed
_MOST_AT_ONCE = 1 << 16  # bytes of output per step


@dataclass(frozen=True)
class Form:
    """Dtype and shape of a tensor.

    Raises
    ------
    TicketError
        If no tensor can have them.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES or not is_shape(self.shape):
            raise FORM.broken(f"there is no tensor of type {self.dtype} and shape {self.shape}")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(name_of(tensor.dtype), tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * DTYPES[self.dtype].itemsize


def pack(tensors: Sequence[Tensor]) -> bytes:
    """Compress tensors; `unpack` needs their forms."""
    planes = []
    for alike in _by_dtype([Form.of(tensor) for tensor in tensors]).values():
        values = torch.cat([as_bytes(tensors[i]) for i in alike])
        planes.append(values.view(-1, tensors[alike[0]].element_size()).T.contiguous().numpy().tobytes())
    return zlib.compress(b"".join(planes), level=9)


def unpack(packed: bytes, forms: Sequence[Form]) -> list[Tensor]:
    """Decompress tensors of the given forms.

    Raises
    ------
    TicketError
        If the bytes do not match the forms. Memory is bounded by the forms.
    """
    if sum(form.nbytes for form in forms) > _MOST_DEFLATED * len(packed):
        raise PACKED.broken("packed tensors are damaged, with too few bytes")
    inflated = _Inflated(packed)
    tensors = [torch.empty(form.shape, dtype=DTYPES[form.dtype]) for form in forms]
    for dtype, alike in _by_dtype(forms).items():
        for plane in range(DTYPES[dtype].itemsize):
            for i in alike:
                inflated.read_into(tensors[i].view(-1).view(torch.uint8)[plane :: DTYPES[dtype].itemsize])
    inflated.finish()
    return tensors


class _Inflated:
    """A reader that inflates deflated bytes piece by piece."""

    def __init__(self, packed: bytes) -> None:
        self._packed, self._at = packed, 0
        self._inflate = zlib.decompressobj()

    def read_into(self, values: Tensor) -> None:
        """Fill a tensor, (n,), uint8, with the next bytes."""
        at = 0
        while at < len(values):
            raw = self._next(min(_MOST_AT_ONCE, len(values) - at))
            if not raw:
                raise PACKED.broken("packed tensors are damaged, with too few bytes")
            values[at : at + len(raw)] = from_bytes(raw)
            at += len(raw)

    def finish(self) -> None:
        """Check that the input ends here."""
        if (
            self._next(1)
            or not self._inflate.eof
            or self._inflate.unused_data
            or self._at < len(self._packed)
        ):
            raise PACKED.broken("packed tensors are damaged, with too few bytes, or too many")

    def _next(self, most: int) -> bytes:
        """Return up to ``most`` of the next bytes; empty at the end."""
        while not self._inflate.eof:
            piece = self._inflate.unconsumed_tail
            if not piece:
                piece = self._packed[self._at : self._at + _PIECE]
                self._at += len(piece)
            try:
                raw = self._inflate.decompress(piece, most)
            except zlib.error as error:
                raise PACKED.broken(f"packed tensors are damaged, {error}") from None
            if raw or not piece:
                return raw
        return b""


def _by_dtype(forms: Sequence[Form]) -> dict[str, list[int]]:
    """Return the indices of the tensors of each dtype."""
    places: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        places.setdefault(form.dtype, []).append(i)
    return places
