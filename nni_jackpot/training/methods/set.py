"""SET: the smallest weights make room for random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.training.method import Step, TrainingMethod, register_training_method


@register_training_method("set")
@dataclass(frozen=True, kw_only=True)
class SET(TrainingMethod):
    """Replace the smallest positive and largest negative weights at random (Mocanu et al. 2018, SET).

    Here new weights start from zero, and weights of exactly zero count as positive.
    A weight that was dropped just now is not drawn.
    """

    zeta: float = option("share of kept weights that an update replaces", between(0, 1), 0.3)
    every: int | None = option("steps between updates; null for an epoch", between(1, 10**6), None)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Replace weights of each layer, except after the last step; each layer keeps its number."""
        if not step.is_due(self.every):
            return
        generator = step.generator()
        for name, mask in masks.items():
            kept = int(mask.sum())
            if kept in (0, mask.numel()):
                continue
            fraction = min(self.zeta, (mask.numel() - kept) / kept)  # no more than there is room for
            weight = weights[name].detach()
            stay = torch.zeros_like(mask)
            is_negative = weight < 0
            for signed in (mask & ~is_negative, mask & is_negative):
                count = int(signed.sum())
                magnitude = weight.abs().masked_fill(~signed, -torch.inf)
                stay |= keep_top(magnitude, count - int(fraction * count))
            draws = torch.rand(mask.shape, generator=generator).to(mask.device)
            grown = keep_top(draws.masked_fill(mask, -torch.inf), kept - int(stay.sum()))
            mask.copy_(stay | grown)
