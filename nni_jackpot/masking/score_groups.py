"""Parameters that share scores, and are searched as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_parameter import MaskedParameter, Space
from nni_jackpot.masking.refresh import Mode


def initial_scores(kept: Tensor, kept_score: float, pruned_score: float, dtype: torch.dtype) -> Tensor:
    """Relax a mask to scores: kept grains get one value, pruned grains a slightly lower one (Sec. 4.1).

    Scores of half-precision weights are float32: a step of the search is far smaller than what bfloat16 can
    add to a number near 1.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    scores = torch.full(kept.shape, pruned_score, dtype=dtype, device=kept.device)
    return scores.masked_fill_(kept, kept_score)


class ScoreGroup:
    """Parameters with one set of scores: a single one, or those of one ``dependency_group_id``.

    All members have the same number of grains, in the same rows, and keep the same grains.

    Parameters
    ----------
    members
        The parameters; the first one registers the scores.
    """

    def __init__(self, members: Sequence[MaskedParameter]) -> None:
        self.members = tuple(members)

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))

    @property
    def space(self) -> Space:
        """Space of the first member, whose settings all members share."""
        return self.members[0].space

    @property
    def grains(self) -> Grains:
        """Grains of the first member."""
        return self.members[0].grains

    @property
    def score(self) -> nn.Parameter:
        """The scores, of the first member's score shape."""
        return self.members[0].score

    @property
    def keep(self) -> int:
        """Number of grains that each member keeps."""
        return self.members[0].keep

    @property
    def weights(self) -> int:
        """Number of weights that the grains stand for, over all members."""
        return self.grains.count * sum(member.grains.size for member in self.members)

    def reduce(self, importance: Mapping[Any, Tensor]) -> Tensor:
        """Return the importance of every grain: the mean over its weights, averaged over the members."""
        reduced = [
            m.grains.reduce(importance[m], lambda weights: weights.mean(-1)).reshape(self.grains.score_shape)
            for m in self.members
        ]
        return reduced[0] if len(reduced) == 1 else torch.stack([r.to(reduced[0]) for r in reduced]).mean(0)

    def set_initial(self, kept: Tensor, kept_score: float, pruned_score: float) -> None:
        """Set masks, budget and scores.

        Parameters
        ----------
        kept
            The grains that the masks keep, boolean.
        kept_score, pruned_score
            Scores of kept and of pruned grains.
        """
        scores = initial_scores(kept, kept_score, pruned_score, self.members[0].weight.dtype)
        score = self.score
        if score is None:
            score = nn.Parameter(scores)
        else:
            with torch.no_grad():
                score.copy_(scores)
        for member in self.members:
            member.set_initial(score, kept, member is self.members[0])

    def set_keep(self, keep: int) -> None:
        """Set the number of grains that the next update keeps."""
        for member in self.members:
            member.keep = keep

    def prune_to(self, keep: int, importance: Tensor) -> None:
        """Keep another number of grains at once: those of largest score, then of largest importance."""
        for member in self.members:
            member.prune_to(keep, importance)

    def limit_swaps(self, share: float | None) -> None:
        """Let one update replace at most this share of the kept grains; None for any number."""
        for member in self.members:
            member.swap_limit = None if share is None else math.ceil(share * member.keep)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of the soft masks that training sees; 0 for the masks."""
        for member in self.members:
            member.temperature = temperature

    def set_mode(self, is_searched: bool) -> None:
        """Set when the masks are updated: by the search or on use."""
        for member in self.members:
            is_soft = member.temperature > 0 and member.grains.rows == 1
            member.mode = (Mode.DEFERRED if is_soft else Mode.EAGER) if is_searched else Mode.LAZY

    def accept(self) -> None:
        """Note a finite loss under the masks: `undo` returns to them."""
        for member in self.members:
            member.last_change.is_accepted = True

    def undo(self, kept_score: float, pruned_score: float) -> None:
        """Return to the masks of the last finite loss, and to initial scores for them."""
        for member in self.members:
            member.last_change.undo(member.mask, member.grains)
        self.set_initial(self.grains.of_mask(self.members[0].mask), kept_score, pruned_score)
