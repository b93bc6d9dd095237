"""Weights that train under masks, which a method may change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_jackpot.errors import MaskError
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.masks import Masks, by_module, fit_masks
from nni_jackpot.modules.parameters import names_of_all
from nni_jackpot.runtime.distributed import broadcast_tensors, rank
from nni_jackpot.training.method import Step, TrainingMethod

_logger = logging.getLogger(__name__)


class SparseTraining:
    """A training under masks: ``begin``, then one ``step`` after each optimizer step, then ``finish``.

    Forward, backward and the schedule of the learning rate belong to the caller. Pruned weights are exactly
    zero in every forward, and the model's parameters stay the same objects.

    Parameters
    ----------
    model
        The network, not wrapped.
    optimizer
        Trains the weights.
    masks
        Masks at the start, in NNI's form; a method that starts dense takes their numbers of weights alone.
    method
        Updates the masks.
    losses
        Losses of a few batches, for a method that ranks by them.
    seed
        Seed of what the method draws.

    Raises
    ------
    MaskError
        If the masks are not those of the model.

    Examples
    --------
    >>> training = SparseTraining(model, optimizer, masks, RigL())
    >>> training.begin(max_steps=len(batches))
    >>> for x, y in batches:
    ...     optimizer.zero_grad()
    ...     loss(model(x), y).backward()
    ...     optimizer.step()
    ...     training.step()
    >>> masks = training.finish()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Masks,
        method: TrainingMethod,
        losses: Losses | None = None,
        seed: int = 0,
    ) -> None:
        given, parameters = fit_masks(model, masks), names_of_all(model)
        if computed := sorted(given.keys() - parameters.keys()):
            raise MaskError(f"{computed[0]} is computed from other tensors: mask the parameters among these")
        first: dict[int, str] = {}  # tied weights are one parameter with several names
        self._names = {name: first.setdefault(id(parameters[name]), name) for name in given}
        self._weights = {name: parameters[name] for name in first.values()}
        self._budgets = {name: int(given[name].count_nonzero()) for name in self._weights}
        self._masks = {name: given[name].to(weight.device) != 0 for name, weight in self._weights.items()}
        if method.is_dense_at_start:
            for mask in self._masks.values():
                mask.fill_(True)
        self._pruned = {name: ~mask for name, mask in self._masks.items()}
        self._model, self._optimizer, self._method = model, optimizer, method
        self._losses, self._seed = losses, seed
        self._steps, self._total, self._epochs = 0, 0, 1
        self._memory: dict[str, Any] = {}
        self._empty: set[str] = set()  # those that a warning has named

    # -- begin, step, finish

    @torch.no_grad()
    def begin(self, max_steps: int, epochs: int = 1) -> None:
        """Set pruned weights to zero.

        Parameters
        ----------
        max_steps
            Steps of the whole training.
        epochs
            Passes over the data in these steps, for methods that update once an epoch.
        """
        self._total, self._epochs = max_steps, epochs
        if self._steps == 0:  # a resumed training has begun before
            before = self._versions()
            self._method.begin(self._masks, self._weights, self._state())
            self._follow(before)
        self._warn_of_empty(self._masks)
        self._zero_pruned()

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks after an optimizer step, while gradients exist; set pruned weights to zero."""
        self._steps += 1
        self._zero_pruned()  # weights that the update adds start from zero, not from the optimizer's step
        before = self._versions()
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in self._weights.items()
        }
        self._method.update(self._masks, self._weights, gradients, self._state())
        self._follow(before)
        self._zero_pruned()

    def finish(self) -> Masks:
        """Return the masks, in NNI's form."""
        return by_module(
            {name: self._masks[first].to(self._weights[first].dtype) for name, first in self._names.items()}
        )

    def _zero_pruned(self) -> None:
        for name, pruned in self._pruned.items():
            self._weights[name].masked_fill_(pruned, 0)

    def _state(self) -> Step:
        return Step(
            number=self._steps,
            total=self._total,
            lr=self._optimizer.param_groups[0]["lr"],
            momentum=self._momentum(),
            memory=self._memory,
            seed=self._seed,
            budgets=self._budgets,
            epochs=self._epochs,
            network=self._model,
            optimizer=self._optimizer,
            losses=self._losses,
        )

    def _momentum(self) -> dict[str, Tensor]:
        found = {}
        for name, weight in self._weights.items():
            own = self._optimizer.state.get(weight, {})
            momentum = own.get("momentum_buffer", own.get("exp_avg"))  # of SGD, or of Adam and its kin
            if momentum is not None:
                found[name] = momentum
        return found

    def _versions(self) -> dict[str, int]:
        return {name: mask._version for name, mask in self._masks.items()}

    def _follow(self, versions: dict[str, int]) -> None:
        """Send changed masks to all processes; reset the momenta of the weights that they add or remove."""
        changed = {name: mask for name, mask in self._masks.items() if mask._version != versions[name]}
        for name, mask in changed.items():
            broadcast_tensors([mask.view(torch.uint8)])
            pruned = ~mask
            for state in self._optimizer.state.get(self._weights[name], {}).values():
                if isinstance(state, Tensor) and state.shape == mask.shape:
                    state.masked_fill_(pruned != self._pruned[name], 0)
            self._pruned[name] = pruned
        self._warn_of_empty(changed)

    def _warn_of_empty(self, masks: Mapping[str, Tensor]) -> None:
        """Warn of weights of which nothing is left; a method's paper has no floor, and none is added."""
        empty = [name for name, mask in masks.items() if name not in self._empty and not mask.any()]
        self._empty.update(empty)
        if empty and rank() == 0:
            _logger.warning(
                "%s keeps nothing of %s: lower the sparse ratio, take the layer out of the config list, or "
                "give masks at the start a budget for each layer, such as erdos_renyi_kernel",
                getattr(self._method, "name", "the training"),
                ", ".join(empty),
            )

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return masks, steps and the method's memory."""
        return {"masks": self._masks, "steps": self._steps, "memory": self._memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; before `begin`."""
        for name, mask in self._masks.items():
            mask.copy_(state["masks"][name])
            self._pruned[name] = ~mask
        self._steps, self._memory = state["steps"], state["memory"]
