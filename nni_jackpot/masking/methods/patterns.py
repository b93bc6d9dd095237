"""Patterns drawn at random for N:M masks, after MaskLLM (Fang et al., NeurIPS 2024, Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from nni_jackpot.errors import ConfigListError
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_parameter import Space
from nni_jackpot.masking.methods.method import RATE, Method, register_method
from nni_jackpot.masking.methods.sampled import Sampled
from nni_jackpot.runtime.settings import option

# Longest groups: 4:8 has 70 patterns.
_LONGEST = 8


class SampledPatterns(Sampled):
    """A masked parameter of which training sees soft samples of N:M patterns.

    The logit of a pattern is the sum of the scores of the grains that the pattern keeps, so the most likely
    pattern of a group contains the N grains of largest score: the mask. A sample is the mean of the patterns
    under the Gumbel-softmax distribution of the logits, through which the gradient reaches the scores.
    MaskLLM has a free logit for each pattern instead.

    Raises
    ------
    ConfigListError
        If the mask has no groups, or longer ones than 8 grains.
    """

    def __init__(self, module_name: str, name: str, space: Space, grains: Grains, seed: int = 0) -> None:
        if grains.count > grains.rows * _LONGEST:
            raise ConfigListError(
                f"method 'patterns' needs a sparse_pattern N:M, M <= {_LONGEST}, for {module_name}.{name}, "
                f"which has rows of {grains.count // grains.rows} grains"
            )
        super().__init__(module_name, name, space, grains, seed)

    def sampled(self, weight: Tensor, score: Tensor, may_write: bool) -> Tensor:
        """Return the weights under a new sample; arguments as for `read`."""
        by_row = self.grains.by_row(score)
        patterns = _patterns(by_row.shape[1], self.keep // self.grains.rows).to(by_row)
        logits = by_row @ patterns.T
        noise = self._draw(logits.detach()).clamp_(min=torch.finfo(logits.dtype).tiny).log_().neg_().log_()
        mask = self.grains.of_rows((logits - noise).softmax(1) @ patterns)
        return weight * self.grains.expand(mask).to(weight.dtype)


def _patterns(length: int, keep: int) -> Tensor:
    """Return all patterns of a group, of shape (patterns, grains)."""
    kept = torch.tensor(list(combinations(range(length), keep)))
    return torch.zeros(len(kept), length).scatter_(1, kept, 1.0)


@register_method("patterns")
@dataclass(frozen=True, kw_only=True)
class Patterns(Method):
    """Settings of the search by samples of N:M patterns; scores are summed to the patterns' logits.

    Attributes
    ----------
    lr, momentum, weight_decay, normalize
        As for `Method`.
    """

    parameter_class = SampledPatterns

    lr: float = option("learning rate of the scores at the start", RATE, 0.03)

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial scores of kept and of pruned grains, of which only the difference matters."""
        return 1.5, -1.5
