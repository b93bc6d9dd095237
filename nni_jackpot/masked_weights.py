"""Masked weights: kept from step to step while they are up to date, and their straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.granularity import Grains


class StraightThrough(torch.autograd.Function):
    """Masked weights ``h(m) * w`` forward (Eq. 4); backward as if h were the identity (Eq. 6)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, score: Tensor, masked: Tensor, mask: Tensor, grains: Grains, may_write: bool
    ) -> Tensor:
        """Return the masked weights, made already; ``mask`` is what they are masked by."""
        ctx.score_dtype = score.dtype
        ctx.grains = grains
        ctx.may_write = may_write
        # The mask is needed only if something upstream of a frozen weight asks for a gradient, as a
        # quantizer's scale does; it is the live mask otherwise, free to change before backward.
        ctx.save_for_backward(weight, mask.clone() if ctx.needs_input_grad[0] else None)
        return masked.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weights and scores."""
        (grad,) = grad_outputs
        weight, mask = ctx.saved_tensors
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
        return grad_weight, grad_score, None, None, None, None


class Masked:
    """Masked weights, and the weight and mask, if any, that they were made of, as these were then."""

    def __init__(self, values: Tensor, weight: Tensor, mask: Tensor | None) -> None:
        self.values = values
        self.weight = weight
        self.is_stale = False  # for a reason that weight and mask do not tell
        self._made_of = _versions(weight, mask)

    def is_ready_for(self, weight: Tensor) -> bool:
        """Return whether they are those of this weight, where everybody tells of changes, but for moves."""
        if torch.compiler.is_compiling():  # which does not know one tensor from another
            is_own = isinstance(weight, nn.Parameter)
        else:
            is_own = weight is self.weight and not self.is_stale
        return is_own and weight.device == self.values.device

    def is_same(self, weight: Tensor, mask: Tensor | None) -> bool:
        """Return whether they would come out the same from these."""
        return not self.is_stale and self._made_of == _versions(weight, mask)


def as_numbers(mask: Tensor) -> Tensor:
    """Return a boolean mask as numbers of 8 bits, by which PyTorch multiplies without a copy as floats."""
    return mask.view(torch.int8)


def _versions(*tensors: Tensor | None) -> list[tuple[int, int, torch.device]]:
    return [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors if tensor is not None]
