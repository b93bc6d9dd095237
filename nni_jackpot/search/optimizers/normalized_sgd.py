"""The optimizer of the scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nni_jackpot.masking.methods.method import Method


def optimizer_of(method: Method, budget_groups: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
    """Return the optimizer of a method's settings.

    Parameters
    ----------
    method
        The settings.
    budget_groups
        The scores, in groups of targets that share a budget.
    """
    scores = [score for group in budget_groups for score in group]
    options: dict[str, Any] = {
        "lr": method.lr,
        "momentum": method.momentum,
        "weight_decay": method.weight_decay,
        # One pass over memory, without copies.
        "fused": all(score.device.type in ("cpu", "cuda") for score in scores),
    }
    return NormalizedSGD(budget_groups, **options) if method.normalize else SGD(scores, **options)


# Norms below this count as zero; all float32 numbers divided by it are finite.
NO_GRADIENT = 1e-30


class NormalizedSGD(SGD):
    """SGD on gradients that are scaled, in place, to a root mean square of 1 over every budget group.

    So ``lr`` is how far a score moves in a step, whatever the scale of weights and loss.

    Parameters
    ----------
    budget_groups
        The scores, in groups of targets that share a budget.
    options
        Options of `torch.optim.SGD`.

    Attributes
    ----------
    budget_groups
        The scores, in groups of targets that share a budget.
    """

    def __init__(self, budget_groups: Sequence[Sequence[nn.Parameter]], **options: Any) -> None:
        super().__init__([parameter for group in budget_groups for parameter in group], **options)
        self._group_of = [i for i, group in enumerate(budget_groups) for _ in group]
        self.budget_groups = [list(group) for group in budget_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients and take a step; gradients that are zero everywhere stay so."""
        sizes = [0] * len(self._group_of)
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        for group, parameter in zip(self._group_of, self.param_groups[0]["params"], strict=True):
            if parameter.grad is not None:
                by_device[parameter.grad.device].append((group, parameter.grad))
                sizes[group] += parameter.numel()
        squares: Tensor | None = None  # of the groups' norms; double, for the squares of small numbers
        for device, found in by_device.items():
            groups, grads = zip(*found, strict=True)
            norms = torch.stack(torch._foreach_norm(grads)).double()
            zeros = torch.zeros(len(sizes), dtype=torch.float64, device=device)
            here = zeros.index_add_(0, _constants(groups, device), norms.square_())
            squares = here if squares is None else squares + here.to(squares.device)
        if squares is not None:
            root_sizes = _constants(tuple(size**0.5 for size in sizes), squares.device)
            factors = root_sizes / squares.sqrt_().clamp_min_(NO_GRADIENT)
            for device, found in by_device.items():
                groups, grads = zip(*found, strict=True)
                own = factors.to(device)[_constants(groups, device)]
                torch._foreach_mul_(grads, own.to(grads[0].dtype).unbind())
        super().step(closure)


@lru_cache(maxsize=16)
def _constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers on a device, cached, since every step needs the same ones."""
    return torch.tensor(numbers, device=device)
