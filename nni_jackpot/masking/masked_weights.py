"""Masked weights: kept from step to step while they are up to date, and their straight-through gradient."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nni_jackpot.masking.granularity import Grains

F = TypeVar("F", bound=Callable[..., Any])


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
        cache: Masked | None,
    ) -> Tensor:
        """Return the masked weights, made already.

        Parameters
        ----------
        weight, score
            What gradients are asked for.
        masked, mask
            The masked weights, and what they are masked by.
        grains
            What a score stands for.
        may_write
            Whether backward may overwrite the gradient of the masked weights, since nobody else will read it.
        cache
            What ``masked`` belongs to; None for masked weights that nobody writes again.
        """
        ctx.score_dtype = score.dtype
        ctx.grains = grains
        ctx.may_write = may_write
        ctx.cache = cache if ctx.needs_input_grad[1] else None
        if ctx.cache is not None:
            ctx.cache.graphs.add(ctx)
        # The mask is needed only if something upstream of a frozen weight asks for a gradient, as a
        # quantizer's scale does; it is the live mask otherwise, free to change before backward.
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
            else:  # as scores lie in memory, whom autograd would give a copy of anything else
                out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
                per_weight = torch.mul(grad, weight, out=out)
            grad_score = ctx.grains.pool(per_weight.to(ctx.score_dtype), lambda weights: weights.sum(-1))
        return grad_weight, grad_score, None, None, None, None, None


class Masked:
    """A cache of masked weights, and the weight, score and mask that the cache was computed from.

    Parameters
    ----------
    values
        The masked weights.
    weight, score
        The tensors of which the cache is.
    mask
        The mask; None for a soft mask, which is a function of the scores alone.

    Attributes
    ----------
    is_stale
        True if the cache is out of date for a reason that the tensors' versions do not show.
    graphs
        The autograd graphs that need the values for a backward pass still to come.
    """

    def __init__(self, values: Tensor, weight: Tensor, score: Tensor, mask: Tensor | None) -> None:
        self.values = values
        self.weight = weight
        self.is_stale = False
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._versions = (weight._version, score._version)
        self._made_of = _identities(weight, mask)

    def is_ready_for(self, weight: Tensor, score: Tensor) -> bool:
        """Return True if a search that refreshes the cache after every step may use the cache as it is."""
        if torch.compiler.is_compiling():  # the compiler knows neither identities nor versions of tensors
            is_own = isinstance(weight, nn.Parameter)
        else:
            is_own = weight is self.weight and not self.is_stale
            is_own = is_own and self._versions == (weight._version, score._version)
        return is_own and (weight.device, weight.dtype) == (self.values.device, self.values.dtype)

    def is_same(self, weight: Tensor, mask: Tensor | None) -> bool:
        """Return True if the masked weights of these tensors are the ones in the cache."""
        return not self.is_stale and self._made_of == _identities(weight, mask)

    def follow(self, score: Tensor) -> None:
        """Note that the cache is what these scores ask for."""
        self._versions = (self.weight._version, score._version)

    def copy(self) -> Masked:
        """Return a cache of the same values in memory of its own, which no graph needs."""
        other = copy.copy(self)
        other.values, other.graphs = self.values.clone(), weakref.WeakSet()
        return other

    def free_values(self) -> Tensor | None:
        """Return the memory of the cache; None where a graph still needs what is there."""
        return None if self.graphs else self.values


def without_gradients(function: F) -> F:
    """Let a function that keeps tensors for later run without gradients, and never in inference mode.

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


def as_numbers(mask: Tensor) -> Tensor:
    """Return a boolean mask as numbers of 8 bits, by which PyTorch multiplies without a copy as floats."""
    return mask.view(torch.int8)


def _identities(*tensors: Tensor | None) -> list[tuple[Any, ...]]:
    return [(t.data_ptr(), t._version, t.dtype, t.device) for t in tensors if t is not None]
