"""How many weights every target keeps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from nni_jackpot.selection import keep_top

Key = TypeVar("Key", bound=Hashable)


def kept_count(numel: int, sparse_ratio: float) -> int:
    """Return how many of ``numel`` weights stay: all but ``int(sparse_ratio * numel)``."""
    return numel - int(sparse_ratio * numel)


def as_configured(importance: Mapping[Key, Tensor], sparse_ratio: float) -> dict[Key, int]:
    """Give every target the same sparse ratio."""
    return {key: kept_count(scores.numel(), sparse_ratio) for key, scores in importance.items()}


def by_global_rank(importance: Mapping[Key, Tensor], sparse_ratio: float) -> dict[Key, int]:
    """Fix every target's budget by one ranking over the whole group (the paper's global sparsity, Sec. 3.1).

    The ``int(sparse_ratio * K)`` least important of all K weights of the group are counted per target; the
    counts, not the positions, are the result: each target then keeps its own top-k (Eq. 5).

    Parameters
    ----------
    importance
        Initial importance of every weight, one tensor a target, comparable across the group.
    sparse_ratio
        Share of zeros in the group as a whole.

    Returns
    -------
    dict
        Kept weights per target, summing to ``K - int(sparse_ratio * K)``. A target may get none.
    """
    # The ranking is taken on one device and in one dtype, whatever the targets' own.
    flat = torch.cat([scores.detach().reshape(-1).float().cpu() for scores in importance.values()])
    kept = keep_top(flat, kept_count(flat.numel(), sparse_ratio))
    parts = kept.split([scores.numel() for scores in importance.values()])
    return {key: int(part.sum()) for key, part in zip(importance, parts, strict=True)}
