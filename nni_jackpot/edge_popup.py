"""The relaxed mask of edge-popup: scores, the mask that follows them, and the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nni_jackpot.selection import keep_top


def initial_scores(mask: Tensor, kept_score: float, pruned_score: float) -> Tensor:
    """Relax a mask to scores: kept weights get one value, the others a slightly lower one (Sec. 4.1).

    Half-precision masks give float32 scores: a step of the search is far smaller than what bfloat16 can add
    to a number near 1.
    """
    dtype = torch.promote_types(mask.dtype, torch.float32) if mask.is_floating_point() else torch.float32
    scores = torch.full(mask.shape, pruned_score, dtype=dtype, device=mask.device)
    return scores.masked_fill_(mask.bool(), kept_score)


class _StraightThrough(torch.autograd.Function):
    """Masked weights ``h(m) * w`` forward (Eq. 4); backward as if h were the identity (Eq. 6)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.score_dtype = score.dtype
        # The mask is needed only if something upstream of a frozen weight asks for a gradient, as a
        # quantizer's scale does; it is the live mask otherwise, free to change before backward.
        ctx.save_for_backward(weight, mask.clone() if ctx.needs_input_grad[0] else None)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        weight, mask = ctx.saved_tensors
        grad_weight = grad * mask if ctx.needs_input_grad[0] else None
        grad_score = (grad * weight).to(ctx.score_dtype) if ctx.needs_input_grad[1] else None
        return grad_weight, grad_score, None


class RelaxedMask:
    """Keeps one target's mask in step with its scores, with exactly ``keep`` ones at every moment.

    Scores and mask stay where PyTorch looks for parameters and buffers; this object holds only what decides
    when the mask is out of date. It is refreshed lazily, by whoever is about to use it, so that every loop,
    optimizer and accumulation scheme is right without being patched.

    Parameters
    ----------
    keep
        How many weights the target keeps.

    Attributes
    ----------
    flips
        How many weights changed sides in the last refresh.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.flips = 0
        self._flipped: Tensor | None = None
        self._seen_version = -1
        self._may_have_moved = False

    def refresh(self, score: Tensor, mask: Tensor) -> None:
        """Let the mask follow the scores, in place, if these may have changed.

        Raises
        ------
        SearchDivergedError
            If a score is NaN; the mask is then left as it was.
        """
        # The version counter alone is not enough: fused optimizers and writes through .data leave it where
        # it was. An optimizer acts on gradients, so a forward that could give some counts as a change.
        if score._version == self._seen_version and not self._may_have_moved:
            return
        before = mask.bool()
        kept = keep_top(score, self.keep, previous=before)
        self._flipped = (kept != before).reshape(-1).nonzero()[:, 0]
        self.flips = self._flipped.numel()
        if self.flips:
            with torch.no_grad():
                mask.copy_(kept)
        self._seen_version = score._version
        self._may_have_moved = False

    def apply(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weights (Eq. 4-6), the mask refreshed first; all of the target's shape."""
        self.refresh(score, mask)
        self._may_have_moved = torch.is_grad_enabled() and score.requires_grad
        return _StraightThrough.apply(weight, score, mask)

    def accept(self) -> None:
        """Note that the mask has proven good, so that `undo` goes back no further."""
        self._flipped = None

    def undo(self, mask: Tensor) -> None:
        """Take back the flips since the mask was last accepted, in place."""
        if self._flipped is not None:
            flat = mask.view(-1)
            flat[self._flipped] = 1 - flat[self._flipped]
            self._flipped = None
