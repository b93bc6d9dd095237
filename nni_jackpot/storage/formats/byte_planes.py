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
    total = sum(form.nbytes for form in forms)
    if total > _MOST_DEFLATED * len(packed):
        raise PACKED.broken("packed tensors are damaged, with too few bytes")
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(packed, total + 1)
    except zlib.error as error:
        raise PACKED.broken(f"packed tensors are damaged, {error}") from None
    if len(raw) != total or not inflate.eof or inflate.unused_data:
        raise PACKED.broken("packed tensors are damaged, with too few bytes, or too many")
    planes, at = from_bytes(raw), 0
    tensors: dict[int, Tensor] = {}
    for dtype, alike in _by_dtype(forms).items():
        width, sizes = DTYPES[dtype].itemsize, [forms[i].size for i in alike]
        own = planes[at : at + width * sum(sizes)].view(width, sum(sizes)).T
        at += own.numel()
        values = own.clone(memory_format=torch.contiguous_format).view(DTYPES[dtype]).view(-1)
        for i, part in zip(alike, values.split(sizes), strict=True):
            tensors[i] = part.clone().view(forms[i].shape)
    return [tensors[i] for i in range(len(forms))]


def _by_dtype(forms: Sequence[Form]) -> dict[str, list[int]]:
    """Return the indices of the tensors of each dtype."""
    places: dict[str, list[int]] = {}
    for i, form in enumerate(forms):
        places.setdefault(form.dtype, []).append(i)
    return places
