"""Deep R: a connection whose weight would change its sign becomes dormant, and a random one wakes up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.training.method import Step, TrainingMethod, register_training_method


@register_training_method("deep_r")
@dataclass(frozen=True, kw_only=True)
class DeepR(TrainingMethod):
    """Walk at random with fixed signs (Bellec et al. 2018, Sec. 2, Algorithm 1).

    Here each layer keeps its own number of connections, signs of kept weights are those after the first
    step, and signs of others are drawn. The optimizer's step, with its momentum, is the paper's gradient
    step.
    """

    l1: float = option("factor of the L1 term, alpha in the paper", between(0, 1e30), 1e-4)
    temperature: float = option("temperature of the noise, T in the paper", between(0, 1e30), 1e-8)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Add L1 term and noise to kept weights; replace those that cross zero."""
        generator = step.generator()
        noise = math.sqrt(2 * step.lr * self.temperature)
        for name, mask in masks.items():
            if step.budgets[name] == mask.numel():
                continue
            weight = weights[name]
            normal, draws = (
                draw(mask.shape, generator=generator).to(weight) for draw in (torch.randn, torch.rand)
            )
            if step.number == 1:
                drawn = torch.where(draws < 0.5, -1.0, 1.0)
                step.memory[name] = torch.where(mask & (weight != 0), weight.sign(), drawn).to(torch.int8)
            sign = step.memory[name]
            theta = sign * weight - step.lr * self.l1 + noise * normal
            dormant = mask & (theta < 0)
            weight.copy_(torch.where(mask & ~dormant, sign * theta, 0))
            if count := int(dormant.sum()):
                stay = mask & ~dormant
                mask.copy_(stay | keep_top(draws.masked_fill(stay, -torch.inf), count))
