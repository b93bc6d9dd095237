"""Conversion between tensors and bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of any dtype in index order, uint8 (numel * itemsize,), on the CPU."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: bytes) -> Tensor:
    """Copy bytes into a new tensor, uint8 (n,)."""
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
