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

from nni_jackpot.errors import TicketError
from nni_jackpot.sealed import DTYPES, as_bytes, from_bytes, name_of

_MOST_DEFLATED = 1032  # bytes that a byte can stand for in zlib's format


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
        if self.dtype not in DTYPES or not all(type(size) is int and size >= 0 for size in self.shape):
            raise TicketError(f"there is no tensor of type {self.dtype} and shape {self.shape}"[:200])

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(name_of(tensor.dtype), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


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
    planes = _inflate(packed, sum(form.nbytes for form in forms))
    tensors: list[Tensor] = [torch.empty(0)] * len(forms)
    for dtype, alike in _by_dtype(forms).items():
        sizes = [forms[i].nbytes for i in alike]
        values, planes = planes[: sum(sizes)], planes[sum(sizes) :]
        whole = values.view(DTYPES[dtype].itemsize, -1).T.contiguous().view(-1)
        for i, part in zip(alike, whole.split(sizes), strict=True):
            tensors[i] = part.clone().view(DTYPES[dtype]).view(forms[i].shape)
    return tensors


def _by_dtype(forms: Sequence[Form]) -> dict[str, list[int]]:
    """Return the places of the tensors of each type."""
    places: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        places.setdefault(form.dtype, []).append(i)
    return places


def _inflate(packed: bytes, size: int) -> Tensor:
    inflate = zlib.decompressobj()
    try:
        if size > _MOST_DEFLATED * len(packed):
            raise zlib.error("too few bytes")
        raw = inflate.decompress(packed, size + 1)
        if len(raw) != size or not inflate.eof or inflate.unused_data:
            raise zlib.error("too few bytes, or too many")
    except zlib.error as error:
        raise TicketError(f"packed tensors are damaged: {error}") from None
    return from_bytes(raw)
