"""The straight-through gradient of masked weights (Eq. 4-6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nni_jackpot.masking.cache import Cache
from nni_jackpot.masking.granularity import Grains


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
