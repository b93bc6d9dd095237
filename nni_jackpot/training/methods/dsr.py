"""DSR: one adaptive threshold prunes all layers; survivors decide where weights grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.training.method import Step, TrainingMethod, register_training_method
from nni_jackpot.training.shares import shares


@register_training_method("dsr")
@dataclass(frozen=True, kw_only=True)
class DSR(TrainingMethod):
    """Prune below a threshold, grow in proportion to survivors (Mostafa and Wang 2019, Algorithm 1).

    Layers that are dense at the start stay dense. Here the number of weights to prune is given as a share.
    """

    threshold: float = option("magnitude below which the first update prunes", between(0, 1e30), 1e-3)
    share: float = option("share of kept weights that updates should prune", between(0, 1), 0.01)
    tolerance: float = option(
        "relative deviation from the share that keeps the threshold", between(0, 1), 0.1
    )
    every: int = option("steps between updates", between(1, 10**6), 1000)

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
        sparse = {name: mask for name, mask in masks.items() if step.budgets[name] < mask.numel()}
        if any(weights[name].isnan().any() for name in sparse):
            raise SearchDivergedError("a weight is NaN")
        threshold = step.memory.get("threshold", self.threshold)
        total = sum(int(mask.sum()) for mask in sparse.values())
        for name, mask in sparse.items():
            mask &= weights[name].detach().abs() >= threshold
        survivors = {name: int(mask.sum()) for name, mask in sparse.items()}
        pruned = total - sum(survivors.values())
        wanted = self.share * total
        if pruned < (1 - self.tolerance) * wanted:
            threshold *= 2
        elif pruned > (1 + self.tolerance) * wanted:
            threshold /= 2
        step.memory["threshold"] = threshold
        room = {name: mask.numel() - survivors[name] for name, mask in sparse.items()}
        generator = step.generator()
        for name, count in shares(pruned, survivors, room).items():
            mask = sparse[name]
            draws = torch.rand(mask.shape, generator=generator).to(mask.device)
            mask |= keep_top(draws.masked_fill(mask, -torch.inf), count)
