"""Weights that train under masks, which a comparator may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nni_jackpot.experiment.comparators.comparator import Comparator, Step
from nni_jackpot.masks import Masks, by_module, named_masks
from nni_jackpot.runtime.distributed import broadcast_tensors


class MaskedTraining:
    """Keep pruned weights at zero after each optimizer step, and let a comparator update the masks.

    Parameters
    ----------
    model
        The network, not wrapped.
    optimizer
        Trains the weights.
    masks
        Masks at the start, in NNI's form; a comparator that starts dense takes their budgets alone.
    comparator
        Updates the masks; None for fixed masks.
    total
        Steps of the whole training.
    seed
        Seed of what the comparator draws.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Masks,
        comparator: Comparator | None,
        total: int,
        seed: int = 0,
    ) -> None:
        parameters = dict(model.named_parameters())
        given = named_masks(masks)
        self._weights = {name: parameters[name] for name in given}
        self._budgets = {name: int((mask != 0).sum()) for name, mask in given.items()}
        self._masks = {name: mask.to(parameters[name].device) != 0 for name, mask in given.items()}
        if comparator is not None and comparator.start == "dense":
            for mask in self._masks.values():
                mask.fill_(True)
        self._pruned = {name: ~mask for name, mask in self._masks.items()}
        self._comparator, self._optimizer, self._total = comparator, optimizer, total
        self._seed = seed
        self._steps = 0
        self._memory: dict[str, Any] = {}

    def masks(self) -> Masks:
        """Return the masks as they are now, in NNI's form."""
        return by_module({name: mask.to(self._weights[name].dtype) for name, mask in self._masks.items()})

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set pruned weights to zero."""
        for name, pruned in self._pruned.items():
            self._weights[name].masked_fill_(pruned, 0)

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Update the masks and set pruned weights to zero; a hook of the optimizer."""
        self._steps += 1
        if self._comparator is not None:
            self.zero_pruned()  # weights that the update adds start from zero, not from the optimizer's step
            self._update(self._comparator)
        self.zero_pruned()

    def _update(self, comparator: Comparator) -> None:
        states = {name: self._optimizer.state.get(weight, {}) for name, weight in self._weights.items()}
        momentum = {name: m for name, own in states.items() if (m := own.get("momentum_buffer")) is not None}
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in self._weights.items()
        }
        versions = {name: mask._version for name, mask in self._masks.items()}
        lr = self._optimizer.param_groups[0]["lr"]
        step = Step(self._steps, self._total, lr, momentum, self._memory, self._seed, self._budgets)
        comparator.update(self._masks, self._weights, gradients, step)
        for name, mask in self._masks.items():
            if mask._version == versions[name]:
                continue
            broadcast_tensors([mask.view(torch.uint8)])
            pruned = ~mask
            if name in momentum:
                momentum[name].masked_fill_(pruned != self._pruned[name], 0)
            self._pruned[name] = pruned

    def state_dict(self) -> dict[str, Any]:
        """Return masks, steps and the comparator's memory."""
        return {"masks": self._masks, "steps": self._steps, "memory": self._memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, mask in self._masks.items():
            mask.copy_(state["masks"][name])
            self._pruned[name] = ~mask
        self._steps, self._memory = state["steps"], state["memory"]
