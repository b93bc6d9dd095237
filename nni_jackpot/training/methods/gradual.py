"""Gradual pruning: zeros ramp up from the dense network, by magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.search.sparsity_schedule import cubic_surplus
from nni_jackpot.training.method import DENSE, Start, Step, TrainingMethod, register_training_method


@register_training_method("gradual")
@dataclass(frozen=True, kw_only=True)
class Gradual(TrainingMethod):
    """Prune the smallest weights of each layer step by step (Zhu and Gupta 2017, Sec. 3, Eq. 1).

    The final number of weights of each layer is that of the masks that the training is given. Here
    a pruned weight stays pruned.
    """

    paper: ClassVar[Start] = Start(DENSE, from_scratch=False)

    every: int = option("steps between updates", between(1, 10**6), 100)
    until: float = option("progress of the training at which all zeros are there", between(0, 1), 0.75)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Prune each layer to the number that the cubic schedule says."""
        last = max(1, math.ceil(self.until * step.total))
        if step.number > last or (step.number % self.every and step.number != last):
            return
        surplus = cubic_surplus(step.number, last)
        for name, mask in masks.items():
            budget = step.budgets[name]
            keep = budget + math.ceil(surplus * (mask.numel() - budget))
            if keep < int(mask.sum()):
                mask.copy_(keep_top(weights[name].detach().abs().masked_fill(~mask, -torch.inf), keep))
