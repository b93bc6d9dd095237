"""Masked weights: their straight-through gradient (Eq. 4-6), and their cache."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from nni_jackpot.masking.granularity import Grains

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


class StraightThrough(torch.autograd.Function):
    """Masked weights ``h(m) * w`` forward (Eq. 4); backward as if h were the identity (Eq. 6)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        score: Tensor,
        masked: Tensor,
        mask: Tensor,
        grains: Grains,
        may_write: bool,
        cache: Cache | None,
    ) -> Tensor:
        """Return the masked weights, which the caller has computed.

        Parameters
        ----------
        weight, score
            The tensors that get gradients.
        masked, mask
            The masked weights, and the mask, of the weight's shape or broadcastable to it.
        grains
            What a score stands for.
        may_write
            Whether backward may overwrite the gradient of the masked weights, because no other code reads it.
        cache
            The cache that ``masked`` belongs to; None if ``masked`` is not written to again.
        """
        ctx.score_dtype = score.dtype
        ctx.grains = grains
        ctx.may_write = may_write
        ctx.cache = cache if ctx.needs_input_grad[1] else None
        if ctx.cache is not None:
            ctx.cache.graphs.add(ctx)
        # Only a weight that is computed, as by a quantizer with a scale, needs the mask. The mask is cloned,
        # because it may change before backward.
        ctx.save_for_backward(weight, mask.clone() if ctx.needs_input_grad[0] else None)
        return masked.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights and scores."""
        (grad,) = grad_outputs
        weight, mask = ctx.saved_tensors
        if ctx.cache is not None and not torch.is_grad_enabled():
            ctx.cache.graphs.discard(ctx)
        grad_weight = grad * mask if ctx.needs_input_grad[0] else None
        grad_score = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():  # by create_graph
                per_weight = grad * weight
            elif ctx.may_write and grad.is_contiguous():
                per_weight = grad.mul_(weight)
            else:  # contiguous like the scores; autograd would copy any other layout
                out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
                per_weight = torch.mul(grad, weight, out=out)
            grad_score = ctx.grains.reduce(per_weight.to(ctx.score_dtype), lambda weights: weights.sum(-1))
        return grad_weight, grad_score, None, None, None, None, None


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
