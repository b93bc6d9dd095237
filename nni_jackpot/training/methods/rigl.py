"""RigL: weights of small magnitude make room for weights of large gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.search.clock import cosine
from nni_jackpot.training.method import Step, TrainingMethod, register_training_method


@register_training_method("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(TrainingMethod):
    """Replace the smallest kept weights by those of largest gradient (Evci et al. 2020, Sec. 3, Algorithm 1).

    Here the masks change after the optimizer's step, and not in its place.
    """

    fraction: float = option("share of kept weights that the first update replaces", between(0, 1), 0.3)
    every: int = option("steps between updates", between(1, 10**6), 100)
    until: float = option("progress of the training after which masks stay fixed", between(0, 1), 0.75)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Replace weights of each layer, as many as the cosine schedule says; each layer keeps its number."""
        end = self.until * step.total
        if step.number % self.every or step.number >= end:
            return
        fraction = self.fraction * cosine(step.number / end)
        for name, mask in masks.items():
            kept = int(mask.sum())
            count = min(int(fraction * kept), mask.numel() - kept)
            if count == 0:
                continue
            magnitude = weights[name].detach().abs().masked_fill(~mask, -torch.inf)
            stay = keep_top(magnitude, kept - count)
            # A weight that was dropped just now may come back, as in Algorithm 1.
            grown = keep_top(gradients[name].abs().masked_fill(stay, -torch.inf), count)
            mask.copy_(stay | grown)
