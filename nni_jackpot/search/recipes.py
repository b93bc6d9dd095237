"""How scores are trained: the paper's settings, and those found to need fewer epochs (docs/recipes.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

# What can be given in the place of a recipe's own: settings of the optimizer, and of edge-popup's masks.
OF_OPTIMIZER = ("lr", "momentum", "weight_decay")
OF_MASKS = ("growth", "temperature", "hardening")


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
        Of the soft masks that training sees at first (`methods.soft_mask`), at the start; it falls to 0
        in a straight line. At 0, training sees the masks.
    hardening
        Progress at which it is 0, in [0, 1]: from there on training sees the masks.
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
    hardening: float
    trades: bool

    def steady(self) -> Recipe:
        """Return the recipe with masks that have their budgets, and are seen by training, throughout."""
        return replace(self, growth=0.0, temperature=0.0, hardening=0.0, trades=False)

    def optimizer(self, pools: list[list[nn.Parameter]]) -> Optimizer:
        """Return the optimizer of the scores, which come in pools of targets that share a budget."""
        on_fast = all(score.device.type in ("cpu", "cuda") for pool in pools for score in pool)
        options: dict[str, Any] = {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "fused": on_fast,  # one pass, no copies
        }
        if self.normalize:
            return NormalizedSGD(pools, **options)
        return SGD([score for pool in pools for score in pool], **options)


RECIPES = {
    # Sec. 4.1 of the paper.
    "paper": Recipe(
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        normalize=False,
        growth=0.0,
        temperature=0.0,
        hardening=0.0,
        trades=False,
    ),
    "jackpot": Recipe(
        lr=0.003,
        momentum=0.9,
        weight_decay=0.05,
        normalize=True,
        growth=0.5,
        temperature=0.5,
        hardening=0.9,
        trades=True,
    ),
}


# A norm that is taken for zero; all numbers of float32 divided by it are still finite.
_NO_GRADIENT = 1e-30


class NormalizedSGD(SGD):
    """SGD on gradients that are scaled, in place, to a root mean square of 1 over every pool."""

    def __init__(self, pools: Sequence[Sequence[nn.Parameter]], **options: Any) -> None:
        super().__init__([parameter for pool in pools for parameter in pool], **options)
        self._pool_of = [i for i, pool in enumerate(pools) for _ in pool]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients and take a step; gradients that are zero everywhere stay so."""
        sizes = [0] * len(self._pool_of)
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        for pool, parameter in zip(self._pool_of, self.param_groups[0]["params"], strict=True):
            if parameter.grad is not None:
                by_device[parameter.grad.device].append((pool, parameter.grad))
                sizes[pool] += parameter.numel()
        squares: Tensor | None = None  # of the norms of pools; double, for the squares of small numbers
        for device, found in by_device.items():
            pools, grads = zip(*found, strict=True)
            norms = torch.stack(torch._foreach_norm(grads)).double()
            zeros = torch.zeros(len(sizes), dtype=torch.float64, device=device)
            here = zeros.index_add_(0, _constants(pools, device), norms.square_())
            squares = here if squares is None else squares + here.to(squares.device)
        if squares is not None:
            root_sizes = _constants(tuple(size**0.5 for size in sizes), squares.device)
            factors = root_sizes / squares.sqrt_().clamp_min_(_NO_GRADIENT)
            for device, found in by_device.items():
                pools, grads = zip(*found, strict=True)
                own = factors.to(device)[_constants(pools, device)]
                torch._foreach_mul_(grads, own.to(grads[0].dtype).unbind())
        super().step(closure)


@lru_cache(maxsize=16)
def _constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers on a device, where they stay: they are the same at every step."""
    return torch.tensor(numbers, device=device)


# Learning rates of supermasks by recipe: logits move further than the scores of edge-popup.
_RATES = {"paper": 100.0, "jackpot": 0.03}


def recipe_of(name: str, method: str) -> Recipe:
    """Return a recipe; as it trains logits, at a rate of theirs and without all that is edge-popup's."""
    if method == "supermask":
        return replace(RECIPES[name].steady(), lr=_RATES[name], weight_decay=0.0)
    return RECIPES[name]
