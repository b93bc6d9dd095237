"""The relaxed mask of edge-popup: scores, the mask that follows them, and the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nni_jackpot.granularity import Grains
from nni_jackpot.selection import swap_at_most


def initial_scores(kept: Tensor, kept_score: float, pruned_score: float, dtype: torch.dtype) -> Tensor:
    """Relax a mask to scores: kept grains get one value, the others a slightly lower one (Sec. 4.1).

    Half-precision weights have float32 scores: a step of the search is far smaller than what bfloat16 can add
    to a number near 1.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    scores = torch.full(kept.shape, pruned_score, dtype=dtype, device=kept.device)
    return scores.masked_fill_(kept, kept_score)


class _StraightThrough(torch.autograd.Function):
    """Masked weights ``h(m) * w`` forward (Eq. 4); backward as if h were the identity (Eq. 6)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor, grains: Grains) -> Tensor:
        ctx.score_dtype = score.dtype
        ctx.grains = grains
        # The mask is needed only if something upstream of a frozen weight asks for a gradient, as a
        # quantizer's scale does; it is the live mask otherwise, free to change before backward.
        ctx.save_for_backward(weight, mask.clone() if ctx.needs_input_grad[0] else None)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        weight, mask = ctx.saved_tensors
        grad_weight = grad * mask if ctx.needs_input_grad[0] else None
        grad_score = None
        if ctx.needs_input_grad[1]:
            per_weight = (grad * weight).to(ctx.score_dtype)
            grad_score = ctx.grains.pool(per_weight, lambda weights: weights.sum(-1))
        return grad_weight, grad_score, None, None


class RelaxedMask:
    """Keeps one target's mask in step with its scores, with exactly ``keep`` grains at every moment.

    Scores and mask stay where PyTorch looks for parameters and buffers; this object holds only what decides
    when the mask is out of date. It is refreshed lazily, by whoever is about to use it, so that every loop,
    optimizer and accumulation scheme is right without being patched.

    Parameters
    ----------
    grains
        What one score stands for.
    keep
        How many grains the target keeps.

    Attributes
    ----------
    swap_limit
        How many grains may enter, and as many leave, in one refresh; None for any number.
    flips
        How many weights changed sides in the last refresh.
    """

    def __init__(self, grains: Grains, keep: int) -> None:
        self.grains = grains
        self.keep = keep
        self.swap_limit: int | None = None
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
        before = self.grains.of_mask(mask)
        scores = score.detach().view(self.grains.score_shape)
        kept = self.grains.select(scores, self.keep, previous=before)
        if self.swap_limit is not None:
            kept = swap_at_most(kept, before, scores, self.swap_limit)
        self._write(kept, before, mask)
        self._seen_version = score._version
        self._may_have_moved = False

    def resize(self, keep: int, score: Tensor, mask: Tensor, favoured: Tensor) -> None:
        """Keep another number of grains from now on: those of largest score, ``favoured`` first among equals.

        Parameters
        ----------
        favoured
            Boolean, of the scores' shape: as many grains as are to be kept, the most important ones.
        """
        self.keep = keep
        kept = self.grains.select(score.detach().view(self.grains.score_shape), keep, previous=favoured)
        self._write(kept, self.grains.of_mask(mask), mask)
        self._seen_version = score._version

    def _write(self, kept: Tensor, before: Tensor, mask: Tensor) -> None:
        self._flipped = (kept != before).reshape(-1).nonzero()[:, 0]
        self.flips = self._flipped.numel() * self.grains.size
        if self.flips:
            with torch.no_grad():
                mask.copy_(self.grains.expand(kept))

    def apply(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weights (Eq. 4-6), of the target's shape, the mask refreshed first."""
        self.refresh(score, mask)
        self._may_have_moved = torch.is_grad_enabled() and score.requires_grad
        return _StraightThrough.apply(weight, score.view(self.grains.score_shape), mask, self.grains)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain data; the mask is to be fresh."""
        return {
            "keep": self.keep,
            "swap_limit": self.swap_limit,
            "flips": self.flips,
            "flipped": self._flipped,
        }

    def restore(self, state: dict[str, Any], score: Tensor) -> None:
        """Take over a state along with the scores and the mask that were of it."""
        self.keep, self.swap_limit, self.flips = state["keep"], state["swap_limit"], state["flips"]
        self._flipped = None if state["flipped"] is None else state["flipped"].to(score.device)
        self._seen_version = score._version
        self._may_have_moved = False

    def accept(self) -> None:
        """Note that the mask has proven good, so that `undo` goes back no further."""
        self._flipped = None

    def undo(self, mask: Tensor) -> None:
        """Take back the flips since the mask was last accepted, in place."""
        if self._flipped is not None:
            kept = self.grains.of_mask(mask)
            kept.view(-1)[self._flipped] ^= True
            mask.copy_(self.grains.expand(kept))
            self._flipped = None
