"""Parameters of one dimension that a search trains along: affines of norm layers, and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

# Learning rate at the start: Adam's default.
LR = 0.001
# How their names end.
KINDS = ("weight", "bias")


def may_be_tuned(name: str, tensor: Tensor) -> bool:
    """Return True if a tensor is an affine of a norm layer or a bias, by its name and form."""
    return name.endswith(KINDS) and tensor.dim() == 1 and tensor.is_floating_point()


def tunable(model: nn.Module, without: Collection[int]) -> dict[str, nn.Parameter]:
    """Return the parameters that may be tuned, by name.

    Parameters
    ----------
    model
        The model, not wrapped.
    without
        Ids of parameters that are searched.
    """
    return {n: p for n, p in model.named_parameters() if id(p) not in without and may_be_tuned(n, p)}


class TunedParameters:
    """Parameters that Adam trains in every step of a search, while all others are frozen.

    Parameters
    ----------
    parameters
        The parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = list(parameters.values())
        self._optimizer = Adam(self._parameters, lr=LR)
        self._lr = LR
        self._accepted = self.values()

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def step(self, factor: float) -> None:
        """Take a step, with a factor of the learning rate, and drop the gradients."""
        self._optimizer.param_groups[0]["lr"] = self._lr * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def values(self) -> list[Tensor]:
        """Return copies of the values now."""
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Return to former values."""
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def accept(self) -> None:
        """Note a finite loss under the values: `undo` returns to them."""
        self._accepted = self.values()

    def undo(self) -> None:
        """Return to the values of the last finite loss."""
        self.restore(self._accepted)

    def slow_down(self, divisor: float) -> None:
        """Divide the learning rate, and forget the moments."""
        self._lr /= divisor
        self._optimizer.state.clear()

    def check_values(self, values: Any) -> None:
        """Raise ValueError for values that these parameters cannot have had."""
        now = self._parameters
        if type(values) is not list or len(values) != len(now):
            raise ValueError("the tuned parameters are others")
        for mine, value in zip(now, values, strict=True):
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (mine.shape, mine.dtype):
                raise ValueError("a tuned parameter has another shape or type")
            if not torch.isfinite(value).all():
                raise ValueError("a tuned parameter is NaN or infinite")

    def state_dict(self) -> dict[str, Any]:
        """Return all that the training needs to continue, besides the parameters."""
        return {"optimizer": self._optimizer.state_dict(), "lr": self._lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the parameters have been restored before."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._lr = float(state["lr"])
        self._accepted = self.values()
