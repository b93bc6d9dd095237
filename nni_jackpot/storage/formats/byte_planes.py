"""Tensors as few bytes: the first bytes of all numbers, then all second ones, and so on, deflated.

Exponents of neighbours are alike, and mantissas are not: set apart, the former compress.
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

_MOST_DEFLATED = 1032  # bytes that a byte can stand for in zlib's format
_PIECE = 1 << 12  # of what is deflated; its rest is copied at each step
_MOST_AT_ONCE = 1 << 16  # of what is inflated


@dataclass(frozen=True)
class Form:
    """Type and shape of a tensor.

    Raises
    ------
    TicketError
        If there are none such.
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
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return self.size * DTYPES[self.dtype].itemsize


def pack(tensors: Sequence[Tensor]) -> bytes:
    """Return the bytes of tensors; their forms are needed to take them back."""
    planes = []
    for alike in _by_dtype([Form.of(tensor) for tensor in tensors]).values():
        values = torch.cat([as_bytes(tensors[i]) for i in alike])
        planes.append(values.view(-1, tensors[alike[0]].element_size()).T.contiguous().numpy().tobytes())
    return zlib.compress(b"".join(planes), level=9)


def unpack(packed: bytes, forms: Sequence[Form]) -> list[Tensor]:
    """Return the tensors of such forms.

    Raises
    ------
    TicketError
        If these bytes are not those of tensors of these forms; no more memory is taken than the forms say.
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
    """What deflated bytes stand for, inflated piece by piece."""

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
        """See that nothing is left."""
        if (
            self._next(1)
            or not self._inflate.eof
            or self._inflate.unused_data
            or self._at < len(self._packed)
        ):
            raise PACKED.broken("packed tensors are damaged, with too few bytes, or too many")

    def _next(self, most: int) -> bytes:
        """Return so many of the next bytes, or fewer; none at the end."""
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
    """Return the places of the tensors of each type."""
    places: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        places.setdefault(form.dtype, []).append(i)
    return places
