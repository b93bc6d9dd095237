"""How scores are trained: the paper's settings, and those found to need fewer epochs (docs/recipes.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import SGD, Optimizer


@dataclass(frozen=True)
class Recipe:
    """Settings of a search.

    Attributes
    ----------
    lr
        Learning rate of the scores at the start.
    momentum, weight_decay
        Of the SGD that trains them.
    normalize
        Whether gradients are scaled first to a root mean square of 1 over each pool of targets that share a
        budget, so that ``lr`` is how far a score moves in a step, whatever the scale of weights and loss.
    growth
        Progress of the search, in [0, 1], at which the masks have all their zeros; it begins with none. At 0
        they have all of them from the start.
    temperature
        Of the soft masks that training sees until then (`nni_jackpot.soft_mask`), at the start; it falls to 0
        in a straight line. At 0, training sees the masks.
    trades
        Whether targets of one pool (``global_group_id``) trade weights in the course of the search, ranked
        together by their scores. If not, budgets are those of the initial importance (Sec. 3.1).
    """

    lr: float
    momentum: float
    weight_decay: float
    normalize: bool
    growth: float
    temperature: float
    trades: bool

    def steady(self) -> Recipe:
        """Return the recipe with masks that have their budgets, and are seen by training, throughout."""
        return replace(self, growth=0.0, temperature=0.0, trades=False)

    def optimizer(self, pools: list[list[nn.Parameter]]) -> Optimizer:
        """Return the optimizer of the scores, which come in pools of targets that share a budget."""
        on_fast = all(score.device.type in ("cpu", "cuda") for pool in pools for score in pool)
        kind = NormalizedSGD if self.normalize else SGD
        return kind(
            [{"params": pool} for pool in pools],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=on_fast,  # one pass, no copies
        )


RECIPES = {
    # Sec. 4.1 of the paper.
    "paper": Recipe(
        lr=0.1, momentum=0.9, weight_decay=5e-4, normalize=False, growth=0.0, temperature=0.0, trades=False
    ),
    "jackpot": Recipe(
        lr=0.003, momentum=0.9, weight_decay=0.0, normalize=True, growth=0.8, temperature=0.5, trades=True
    ),
}


# A norm that is taken for zero; all numbers of float32 divided by it are still finite.
_NO_GRADIENT = 1e-30


class NormalizedSGD(SGD):
    """SGD on gradients that are scaled, in place, to a root mean square of 1 over every parameter group."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients and take a step; gradients that are zero everywhere stay so."""
        for group in self.param_groups:
            if grads := [p.grad for p in group["params"] if p.grad is not None]:
                size = sum(grad.numel() for grad in grads)
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                torch._foreach_mul_(grads, size**0.5 / norm.clamp_min(_NO_GRADIENT))
        super().step(closure)
