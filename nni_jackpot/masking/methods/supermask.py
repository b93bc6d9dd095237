"""The supermask of Zhou et al. ("Deconstructing Lottery Tickets", 2019, Sec. 5): masks drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.masking.masked_weights import StraightThrough
from nni_jackpot.masking.methods.method import RATE, Method, register_method
from nni_jackpot.masking.methods.sampled import Sampled
from nni_jackpot.runtime.settings import option

# Newton steps per sample, each from the last result, and the longest step.
_STEPS, _STRIDE = 3, 1.0


class SampledMask(Sampled):
    """A masked parameter of which training sees samples, with ``keep`` grains on average.

    Scores are logits. A sample keeps every grain with probability ``sigmoid(score + shift)``, and the
    gradient passes through the draw as if the draw were the identity. The shift is one number per row of
    grains, such that the probabilities of the row sum to the row's budget; Newton's method updates the shift,
    which counts as a constant in the gradient. The mask itself contains the ``keep`` grains of largest score,
    as in edge-popup; biases and outputs that follow a mask follow this one.
    """

    def reset(self, keep: int) -> None:
        """Return to the state before a search, with a mask of ``keep`` grains."""
        super().reset(keep)
        self._shift = torch.zeros(self.grains.rows, 1)

    def sampled(self, weight: Tensor, score: Tensor, may_write: bool) -> Tensor:
        """Return the weights under a new sample; arguments as for `read`."""
        probability = torch.sigmoid(score + self._follow(score.detach()))
        with torch.no_grad():
            sample = self.grains.expand(self._draw(probability) < probability).expand(self.grains.shape)
            masked = weight * sample.view(torch.int8)
        return StraightThrough.apply(weight, probability, masked, sample, self.grains, may_write, None)

    @torch.no_grad()
    def _follow(self, score: Tensor) -> Tensor:
        """Update the shift to the scores, and return the shift of every grain."""
        by_row = self.grains.by_row(score)
        shift = self._shift.to(score)
        for _ in range(_STEPS):
            probability = torch.sigmoid(by_row + shift)
            lacking = self.keep // self.grains.rows - probability.sum(1, keepdim=True)
            slope = (probability * (1 - probability)).sum(1, keepdim=True)
            shift = shift + (lacking / slope.clamp_min(1e-6)).clamp(-_STRIDE, _STRIDE)
        self._shift = shift
        return self.grains.of_rows(shift.expand_as(by_row))

    def state_dict(self) -> dict[str, Any]:
        """Return mask and state as plain data."""
        return {**super().state_dict(), "shift": self._shift}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore mask and state."""
        super().load_state_dict(state)
        self._shift = state["shift"]


@register_method("supermask")
@dataclass(frozen=True, kw_only=True)
class Supermask(Method):
    """Settings of the supermask search; scores are logits, which move further than those of edge-popup.

    Attributes
    ----------
    lr, momentum, weight_decay, normalize
        As for `Method`.
    """

    parameter_class = SampledMask

    lr: float = option("learning rate of the logits at the start", RATE, 0.03)

    @classmethod
    def paper(cls, **settings: Any) -> Supermask:
        """Return settings for gradients that are not normalized, with ``settings`` in place of some."""
        return replace(cls(lr=100.0, normalize=False), **settings)

    @classmethod
    def recipes(cls) -> dict[str, Method]:
        """Return the default settings, and those for gradients that are not normalized."""
        return {"default": cls(), "paper": cls.paper()}

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial logits of kept and of pruned grains, of which only the difference matters."""
        return 3.0, -3.0
