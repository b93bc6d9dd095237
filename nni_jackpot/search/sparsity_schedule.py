"""Masks over a search: zeros that ramp up, soft masks that harden, and budgets that are reallocated."""

from __future__ import annotations

import math
from dataclasses import replace

from nni_jackpot.masking.budgets import Unit, by_global_rank
from nni_jackpot.masking.methods.method import MaskSchedule
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.search.initial_masks import unit_of

# Rankings of all scores of a budget group in one search; a ranking takes about as long as a step.
_RANKINGS = 64


class SparsitySchedule:
    """Control how many weights each target keeps, and how soft its mask is, over the search.

    - Zeros ramp up: the share of weights kept falls from 1 at the start to the budget at the progress
      ``ramp_end``, by the cubic law of Zhu and Gupta ("To prune, or not to prune", 2017, Eq. 1).
    - Soft masks harden: the temperature (`masking.soft_mask`) falls linearly to 0 at the progress
      ``anneal_end``.
    - Budgets are reallocated: targets of one budget group are ranked together by their scores, and keep the
      same number of weights in all, until all zeros are there.

    Parameters
    ----------
    budget_groups
        What is searched, in groups of targets that share a budget: the sum of what they keep now.
    settings
        The schedule's settings.

    Attributes
    ----------
    rankings
        Number of the last ranking, from 0; -1 before the first.
    """

    def __init__(self, budget_groups: list[list[ScoreGroup]], settings: MaskSchedule) -> None:
        self.settings = settings
        self._budgets = {group: group.keep for members in budget_groups for group in members}
        self._ranked = [m for m in budget_groups if settings.reallocate and len(m) > 1]
        alone = [members for members in budget_groups if members not in self._ranked]
        self._alone = [group for members in alone for group in members] if settings.ramp_end else []
        self.rankings = -1
        # The last ranking is made with all zeros, so that norm statistics have time to adapt.
        self._last_ranking = math.ceil(_RANKINGS * (settings.ramp_end or 1))

    def is_hard_at(self, progress: float) -> bool:
        """Return True if training sees the masks themselves at a progress in [0, 1]."""
        return not self.settings.temperature * _remaining(progress, self.settings.anneal_end)

    def follow(self, progress: float) -> None:
        """Set budgets and temperature for a progress in [0, 1]; the next update of the masks uses them."""
        surplus = cubic_surplus(progress, self.settings.ramp_end)
        self._set_temperature(self.settings.temperature * _remaining(progress, self.settings.anneal_end))
        for group in self._alone:
            pruned = (group.grains.count - self._budgets[group]) // group.grains.rows  # per row
            group.set_keep(self._budgets[group] + group.grains.rows * math.ceil(surplus * pruned))
        ranking = min(self._last_ranking, int(_RANKINGS * progress))
        if ranking > self.rankings:
            self.rankings = ranking
            for members in self._ranked:
                self._rank(members, surplus)

    def _set_temperature(self, temperature: float) -> None:
        for group in self._budgets:
            group.set_temperature(temperature)

    def _rank(self, members: list[ScoreGroup], surplus: float) -> None:
        size = sum(group.weights for group in members)
        kept = sum(self._budgets[group] * group.weights // group.grains.count for group in members)
        # Half a weight more, so that `int` in the ranking finds the number again.
        ratio = min(1.0, (size - kept + 0.5) / size)
        units = {group: _unit(group, ratio, 1 - surplus) for group in members}
        for group, keep in by_global_rank(units, {group: group.score for group in members}).items():
            group.set_keep(keep)

    def finish(self) -> None:
        """Prune to the budgets, by score and then by magnitude, if the search was cut short."""
        self._set_temperature(0.0)
        is_ranked = not self._ranked or self.rankings == self._last_ranking
        is_pruned = all(group.keep == self._budgets[group] for group in self._alone)
        if not self.settings.ramp_end or (is_ranked and is_pruned):
            return
        self.rankings = -1
        self.follow(1.0)
        for group in self._budgets:
            group.prune_to(group.keep, group.reduce({m: m.weight.detach().abs() for m in group.members}))


def cubic_surplus(progress: float, end: float) -> float:
    """Return the share of zeros yet to come at a progress in [0, 1] (Zhu and Gupta 2017, Eq. 1)."""
    return _remaining(progress, end) ** 3


def _remaining(progress: float, end: float) -> float:
    """Return the share that remains of a phase from the start of the search to the progress ``end``."""
    return max(0.0, 1 - progress / end) if end else 0.0


def _unit(group: ScoreGroup, ratio: float, ramped: float) -> Unit:
    """Describe a member of a budget group of a sparse ratio, of whose zeros the share ``ramped`` is there."""
    unit = unit_of(group, ratio * ramped)
    return replace(unit, min_sparse_ratio=unit.min_sparse_ratio * ramped).with_floor(ratio)
