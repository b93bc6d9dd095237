"""The cache of masked weights, and what functions need that keep tensors for later."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Cache:
    """Masked weights, and the key of the tensors that they were computed from.

    Parameters
    ----------
    values
        The masked weights.
    weight
        The frozen weights.
    key
        All that the values depend on; a cache whose key differs is stale (`MaskedParameter.cache_key`).

    Attributes
    ----------
    checked
        Versions of weight and scores for which the key was last compared.
    graphs
        Autograd graphs that need the values for a backward pass still to come.
    """

    def __init__(self, values: Tensor, weight: Tensor, key: tuple[Any, ...]) -> None:
        self.values = values
        self.weight = weight
        self.key = key
        self.checked: tuple[Any, ...] = ()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def copy(self) -> Cache:
        """Return a cache of the same values in new memory, which no graph needs."""
        other = copy.copy(self)
        other.values, other.graphs = self.values.clone(), weakref.WeakSet()
        return other


def without_gradients(function: F) -> F:
    """Run a function that keeps tensors for later without gradients, and never in inference mode.

    A tensor made in inference mode can neither be changed in place nor be saved for backward afterwards.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, run)


def as_int8(mask: Tensor) -> Tensor:
    """View a boolean mask as int8, by which PyTorch multiplies without converting the mask to floats."""
    return mask.view(torch.int8)


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor moves, is converted, or is written to in place."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device
