"""What is searched: targets, each a weight with score and mask, and groups of targets with common scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nni_jackpot.masking.batched_refresh import refresh_together, wait_together
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.methods.edge_popup import RelaxedMask, Target, initial_scores


class Space(Protocol):
    """Where the tensors of a target are kept, and what is asked of it: NNI's target space.

    Attributes
    ----------
    target
        The frozen weights.
    setting
        What the config list says of the target.
    """

    target: Any
    setting: dict[str, Any]
    sparse_ratio: float | None
    sparse_threshold: Any
    min_sparse_ratio: float | None
    max_sparse_ratio: float | None
    global_group_id: Any
    granularity: Any

    @property
    def own_mask(self) -> Tensor:
        """The mask, boolean, of the target's shape."""

    @property
    def score(self) -> Any:
        """The scores; None before the search of the target begins."""

    @property
    def relaxed(self) -> RelaxedMask:
        """What keeps the mask in step with the scores."""

    def start(self, score: nn.Parameter, mask: Tensor, relaxed: RelaxedMask, is_first: bool) -> None:
        """Keep the tensors; targets after the first have the scores in common with it."""


class ScoredTarget(NamedTuple):
    """A pruning target that is searched: a weight, its score, and the mask that follows the score."""

    module_name: str
    name: str
    space: Space
    grains: Grains

    def __str__(self) -> str:
        return f"{self.module_name}.{self.name}"

    @property
    def weight(self) -> Tensor:
        """The frozen weights."""
        return self.space.target

    @property
    def mask(self) -> Tensor:
        """The mask, boolean, of the target's shape; up to date once it has been refreshed."""
        return self.space.own_mask

    @property
    def score(self) -> nn.Parameter:
        """The scores, one a grain; targets of one dependency group have them in common."""
        return self.space.score

    @property
    def relaxed(self) -> RelaxedMask:
        """What keeps the mask in step with the scores."""
        return self.space.relaxed

    @property
    def parts(self) -> Target:
        """What is refreshed together with others."""
        return self.relaxed, self.score, self.mask


class ScoreGroup(NamedTuple):
    """Targets with one set of scores: a single target, or those of one ``dependency_group_id``.

    All members have the same number of grains, in the same rows, and keep the same ones. ``relax`` makes what
    keeps a member's mask in step with the scores.
    """

    members: tuple[ScoredTarget, ...]
    relax: Callable[[Grains, int], RelaxedMask] = RelaxedMask

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))

    @property
    def space(self) -> Space:
        """The first member's target space, which has the settings that all members share."""
        return self.members[0].space

    @property
    def grains(self) -> Grains:
        """The first member's grains."""
        return self.members[0].grains

    @property
    def score(self) -> nn.Parameter:
        """The scores, of the first member's score shape."""
        return self.members[0].score

    def pool(self, importance: Mapping[Any, Tensor]) -> Tensor:
        """Return the importance of every grain: the mean over its weights, averaged over the members."""
        pooled = [
            t.grains.pool(importance[t], lambda weights: weights.mean(-1)).reshape(self.grains.score_shape)
            for t in self.members
        ]
        return pooled[0] if len(pooled) == 1 else torch.stack([p.to(pooled[0]) for p in pooled]).mean(0)

    def seed(self, kept: Tensor, kept_score: float, pruned_score: float) -> None:
        """Set the masks (boolean ``kept``, one a grain), the budget, and the scores that stand for them."""
        scores = initial_scores(kept, kept_score, pruned_score, self.members[0].weight.dtype)
        score = self.score
        if score is None:
            score = nn.Parameter(scores)
        else:
            with torch.no_grad():
                score.copy_(scores)
        for target in self.members:
            mask = target.grains.expand(kept.view(target.grains.score_shape))
            mask = mask.to(target.weight.device).expand(target.grains.shape).clone()
            relaxed = self.relax(target.grains, int(kept.sum()))
            relaxed.settle(score)  # the mask is what these scores ask for
            target.space.start(score, mask, relaxed, target is self.members[0])

    def limit_swaps(self, share: float | None) -> None:
        """Let a refresh replace no more than this share of the kept grains; None for any number."""
        for target in self.members:
            target.relaxed.swap_limit = None if share is None else math.ceil(share * target.relaxed.keep)

    def soften(self, temperature: float) -> None:
        """Let training see soft masks of this temperature from the next refresh on; 0 for the masks."""
        for target in self.members:
            target.relaxed.soften(temperature)

    def tell(self, is_told: bool) -> None:
        """Say whether `refresh_scored` will be called after every change of the scores."""
        for target in self.members:
            target.relaxed.is_told = is_told

    def accept(self) -> None:
        """Note that the masks have proven good, so that `undo` goes back no further."""
        for target in self.members:
            target.relaxed.accept()

    def undo(self, kept_score: float, pruned_score: float) -> None:
        """Go back to the masks that were accepted last, and to scores that stand for them."""
        for target in self.members:
            target.relaxed.undo(target.mask)
        self.seed(self.grains.of_mask(self.members[0].mask), kept_score, pruned_score)

    @property
    def weights(self) -> int:
        """How many weights the grains stand for, over all members."""
        return self.grains.count * sum(target.grains.size for target in self.members)

    @property
    def keep(self) -> int:
        """How many grains the first member, and every other, keeps."""
        return self.members[0].relaxed.keep

    def aim_at(self, keep: int) -> None:
        """Keep another number of grains from the next refresh on."""
        for target in self.members:
            target.relaxed.keep = keep

    def resize(self, keep: int, importance: Tensor) -> None:
        """Keep another number of grains from now on; among equal scores those of largest importance."""
        favoured = self.grains.select(importance, keep)
        for target in self.members:
            shaped = favoured.view(target.grains.score_shape)
            target.relaxed.resize(keep, target.score, target.mask, shaped)


def remake_values(groups: Iterable[ScoreGroup]) -> None:
    """Make the masked weights of a search anew, where scores and masks have been put in their places."""
    targets = [target for group in groups for target in group.members]
    wait_together(target.parts for target in targets if target.relaxed.can_wait)
    for target in targets:
        if isinstance(target.weight, nn.Parameter):
            target.relaxed.make(target.weight, target.score, target.mask)


def refresh_scored(groups: Iterable[ScoreGroup]) -> None:
    """Bring the masks of groups that training sees up to date with their scores, all at once.

    Raises
    ------
    SearchDivergedError
        If a score is NaN.
    """
    waiting: list[Target] = []
    seen: list[Target] = []
    for target in (target for group in groups for target in group.members):
        (waiting if target.relaxed.can_wait else seen).append(target.parts)
    wait_together(waiting)
    refresh_together(seen)
