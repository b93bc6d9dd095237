"""A masked parameter of which training sees a new random sample in every forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.refresh import Mode


class Sampled(MaskedParameter):
    """A masked parameter of which training sees samples; other forwards see the mask."""

    def reset(self, keep: int) -> None:
        """Return to the state before a search, with a mask of ``keep`` grains."""
        super().reset(keep)
        self._samples = 0

    def read(self, weight: Tensor, is_training: bool, may_write: bool = False) -> Tensor:
        """Return the weights under a new sample in training, else under the mask."""
        # Without gradients, as when norm statistics are estimated, the mask itself counts.
        if is_training and torch.is_grad_enabled():
            return self.sample(weight, may_write)
        return self.masked(weight, may_write)

    @torch.compiler.disable
    def sample(self, weight: Tensor, may_write: bool = False) -> Tensor:
        """Return the weights under a new sample; arguments as for `read`."""
        if self.keep == self.grains.count:  # all grains are in every sample
            return self.masked(weight, may_write)
        self.is_read = True
        if self.mode is Mode.LAZY:  # an optimizer may follow
            self.note_change()
        return self.sampled(weight, self.score.view(self.grains.score_shape), may_write)

    @abstractmethod
    def sampled(self, weight: Tensor, score: Tensor, may_write: bool) -> Tensor:
        """Return the weights under a new sample, for scores of the grains' shape; others as for `read`."""

    def _draw(self, like: Tensor) -> Tensor:
        """Return uniform random numbers for the next sample."""
        state = np.random.SeedSequence([self.seed, self._samples]).generate_state(1, np.uint64)
        self._samples += 1
        generator = torch.Generator(like.device).manual_seed(int(state[0]))
        return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Return mask and state as plain data."""
        return {**super().state_dict(), "seed": self.seed, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore mask and state."""
        super().load_state_dict(state)
        self.seed, self._samples = state["seed"], state["samples"]
