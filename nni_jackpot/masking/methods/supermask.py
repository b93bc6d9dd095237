"""The supermask of Zhou et al. ("Deconstructing Lottery Tickets", 2019, Sec. 5): masks drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_weights import StraightThrough
from nni_jackpot.masking.methods.edge_popup import RelaxedMask
from nni_jackpot.masking.methods.method import RATE, Method, register_method
from nni_jackpot.runtime.settings import option

# Initial scores of kept and of pruned grains: logits, of which only the difference matters.
LOGITS = (3.0, -3.0)
# Newton's steps a sample, each from where the last has come to, and how far one may go.
_STEPS, _STRIDE = 3, 1.0


class SampledMask(RelaxedMask):
    """A relaxed mask that training does not see: it sees samples, which have the mask's size on average.

    Scores are logits. A sample keeps every grain with probability ``sigmoid(score + shift)``, and the
    gradient passes through the draw as if that were the identity. The shift is one number for each row of
    grains, with which the probabilities of the row sum to what the mask keeps of it; it follows scores and
    budget by Newton's method, and counts as a constant in the gradient. The mask itself is that of
    edge-popup: the grains of largest score, exactly ``keep`` of them. Biases and outputs that follow a mask
    follow this one.

    Parameters
    ----------
    grains, keep
        As for `RelaxedMask`.
    seed
        The sample is a function of it and of the number of samples before; targets that share scores have it
        in common.
    """

    method = "supermask"

    def __init__(self, grains: Grains, keep: int, seed: int) -> None:
        super().__init__(grains, keep)
        self._seed = seed
        self._samples = 0
        self._shift = torch.zeros(grains.rows, 1)

    @torch.compiler.disable
    def sample(self, weight: Tensor, score: Tensor, mask: Tensor, may_write: bool = False) -> Tensor:
        """Return weights under a new sample, of the target's shape; arguments are those of `apply`."""
        if self.keep == self.grains.count:  # no finite shift keeps all of them
            return self.apply(weight, score, mask, may_write)
        self.is_read = True
        self._may_have_moved = not self.is_told
        score = score.view(self.grains.score_shape)
        probability = torch.sigmoid(score + self._follow(score.detach()))
        with torch.no_grad():
            sample = self.grains.expand(self._draw(probability) < probability).expand(self.grains.shape)
            masked = weight * sample.view(torch.int8)
        return StraightThrough.apply(weight, probability, masked, sample, self.grains, may_write, None)

    @torch.no_grad()
    def _follow(self, score: Tensor) -> Tensor:
        """Let the shift follow the scores, and return that of every grain."""
        by_row = self.grains.by_row(score)
        shift = self._shift.to(score)
        for _ in range(_STEPS):
            probability = torch.sigmoid(by_row + shift)
            lacking = self.keep // self.grains.rows - probability.sum(1, keepdim=True)
            slope = (probability * (1 - probability)).sum(1, keepdim=True)
            shift = shift + (lacking / slope.clamp_min(1e-6)).clamp(-_STRIDE, _STRIDE)
        self._shift = shift
        return self.grains.of_rows(shift.expand_as(by_row))

    def _draw(self, like: Tensor) -> Tensor:
        """Return uniform numbers, those of the next sample."""
        state = np.random.SeedSequence([self._seed, self._samples]).generate_state(1, np.uint64)
        self._samples += 1
        generator = torch.Generator(like.device).manual_seed(int(state[0]))
        return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain data."""
        return {**super().state(), "seed": self._seed, "samples": self._samples, "shift": self._shift}

    def restore(self, state: dict[str, Any], score: Tensor) -> None:
        """Take over a state along with the scores and the mask that were of it."""
        super().restore(state, score)
        self._seed, self._samples, self._shift = state["seed"], state["samples"], state["shift"]


@register_method("supermask")
@dataclass(frozen=True, kw_only=True)
class Supermask(Method):
    """Settings of supermasks: scores are logits, which move further than the scores of edge-popup."""

    lr: float = option("learning rate of the scores at the start", RATE, 0.03)

    @classmethod
    def paper(cls, **changes: Any) -> Supermask:
        """Return the settings that go with the paper's recipe."""
        return cls(**{"lr": 100.0, "normalize": False, **changes})

    @classmethod
    def recipes(cls) -> dict[str, Method]:
        """Return the named sets of settings."""
        return {"default": cls(), "paper": cls.paper()}

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial scores of kept and of pruned grains."""
        return LOGITS
