"""Sparse momentum: layers of large mean momentum grow weights of large momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.search.clock import cosine
from nni_jackpot.training.method import Step, TrainingMethod, register_training_method
from nni_jackpot.training.shares import shares


@register_training_method("sparse_momentum")
@dataclass(frozen=True, kw_only=True)
class SparseMomentum(TrainingMethod):
    """Prune by magnitude, redistribute and grow by momentum (Dettmers and Zettlemoyer 2019, Algorithm 1).

    Layers that are dense at the start stay dense. Without momentum of the optimizer, gradients take its
    place.
    """

    rate: float = option("share of kept weights that the first update prunes", between(0, 1), 0.2)
    every: int | None = option("steps between updates; null for an epoch", between(1, 10**6), None)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Move weights within and between layers; the number of all layers together stays."""
        if not step.is_due(self.every):
            return
        rate = self.rate * cosine(step.number / step.total)
        sparse = {name: mask for name, mask in masks.items() if step.budgets[name] < mask.numel()}
        size = {name: step.momentum.get(name, gradients[name]).abs() for name in sparse}
        means = {name: float(size[name][mask].mean()) if mask.any() else 0.0 for name, mask in sparse.items()}
        if not all(0 <= mean < float("inf") for mean in means.values()):
            raise SearchDivergedError("a momentum is not finite")
        total = sum(int(mask.sum()) for mask in sparse.values())
        for name, mask in sparse.items():
            kept = int(mask.sum())
            magnitude = weights[name].detach().abs().masked_fill(~mask, -torch.inf)
            mask.copy_(keep_top(magnitude, kept - int(rate * kept)))
        room = {name: int((~mask).sum()) for name, mask in sparse.items()}
        pruned = total - sum(int(mask.sum()) for mask in sparse.values())
        for name, count in shares(pruned, means, room).items():
            mask = sparse[name]
            mask |= keep_top(size[name].masked_fill(mask, -torch.inf), count)
