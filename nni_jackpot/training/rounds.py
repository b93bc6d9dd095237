"""Iterative pruning: how many weights a round keeps, and which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.masking.topk import keep_top


def kept_after(done: int, rounds: int, masks: Mapping[str, Tensor], budgets: Mapping[str, int]) -> int:
    """Return how many weights are left after some rounds, each of which keeps the same share.

    Parameters
    ----------
    done, rounds
        Rounds done, and rounds in all.
    masks, budgets
        The masks, and the numbers of weights after the last round, by name.
    """
    total, final = sum(mask.numel() for mask in masks.values()), sum(budgets.values())
    return final if done == rounds else round(total * (final / total) ** (done / rounds))


def keep_most(masks: Mapping[str, Tensor], importance: Mapping[Any, Tensor], keep: int) -> None:
    """Keep the most important of the weights that masks keep, all layers ranked together; in place."""
    parts = [
        importance[name].masked_fill(~mask, -torch.inf).cpu().reshape(-1) for name, mask in masks.items()
    ]
    kept = keep_top(torch.cat(parts), keep).split([part.numel() for part in parts])
    for mask, part in zip(masks.values(), kept, strict=True):
        mask.copy_(part.view_as(mask))
