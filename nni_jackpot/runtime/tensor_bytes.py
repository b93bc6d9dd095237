"""Tensors as bytes, and bytes as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of any type in index order, (numel * itemsize,), on the CPU."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: bytes) -> Tensor:
    """Return bytes as a tensor of their own, (n,), uint8."""
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
