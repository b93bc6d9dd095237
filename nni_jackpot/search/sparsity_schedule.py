"""Masks in the course of a search: zeros that grow, masks that harden, and budgets that move."""

from __future__ import annotations

import math

from nni_jackpot.masking.budgets import Unit, by_global_rank
from nni_jackpot.masking.targets import ScoreGroup
from nni_jackpot.search.recipes import Recipe

# Rankings of all scores of a pool in one search: each takes about as long as a step.
_RANKINGS = 64
# What a target keeps at least, relative to the density of its pool: no layer is lost to the others.
_FLOOR = 0.1


class Growth:
    """Set the number that every target keeps, which is its budget but for what is said here, and how softly.

    Zeros may grow: the search begins with all weights, and prunes by scores that have been trained on all of
    them. The share of weights kept falls from 1 at the start to the budget at the progress ``growth``, by the
    cubic law of Zhu and Gupta ("To prune, or not to prune", 2017, Eq. 1).

    Masks may harden: until the progress ``hardening`` training sees soft masks (`masking.methods.soft_mask`),
    whose temperature falls in a straight line to 0.

    Budgets may move: targets of one pool trade weights, ranked together by their scores, and keep the number
    of zeros in all. Once all zeros are there, budgets stay.

    Parameters
    ----------
    pools
        What is searched, in pools of targets that share a budget, of which the numbers that they keep now are
        the sum.
    recipe
        Of which ``growth``, ``temperature``, ``hardening`` and ``trades`` are followed.

    Attributes
    ----------
    rankings
        Number of the last ranking, from 0; -1 before the first.
    """

    def __init__(self, pools: list[list[ScoreGroup]], recipe: Recipe) -> None:
        self.recipe = recipe
        self._budgets = {group: group.keep for pool in pools for group in pool}
        self._pools = [pool for pool in pools if recipe.trades and len(pool) > 1]
        alone = [pool for pool in pools if pool not in self._pools]
        self._alone = [group for pool in alone for group in pool] if recipe.growth else []
        self.rankings = -1
        # The last ranking is that of all zeros, so that normalisation statistics have time to follow.
        self._last_ranking = math.ceil(_RANKINGS * (recipe.growth or 1))

    def follow(self, progress: float) -> None:
        """Set the numbers that the next refresh keeps, and how softly, at a progress in [0, 1]."""
        surplus = _ahead(progress, self.recipe.growth) ** 3
        self._soften(self.recipe.temperature * _ahead(progress, self.recipe.hardening))
        for group in self._alone:
            pruned = (group.grains.count - self._budgets[group]) // group.grains.rows  # of a row
            group.aim_at(self._budgets[group] + group.grains.rows * math.ceil(surplus * pruned))
        ranking = min(self._last_ranking, int(_RANKINGS * progress))
        if ranking > self.rankings:
            self.rankings = ranking
            for pool in self._pools:
                self._rank(pool, surplus)

    def _soften(self, temperature: float) -> None:
        for group in self._budgets:
            group.soften(temperature)

    def _rank(self, pool: list[ScoreGroup], surplus: float) -> None:
        size = sum(group.weights for group in pool)
        kept = sum(self._budgets[group] * group.weights // group.grains.count for group in pool)
        # Half a weight more, so that ``int`` finds the number again.
        ratio = min(1.0, (size - kept + 0.5) / size)
        units = {group: _unit(group, ratio, 1 - surplus) for group in pool}
        for group, keep in by_global_rank(units, {group: group.score for group in pool}).items():
            group.aim_at(keep)

    def finish(self) -> None:
        """Have all zeros, where a search was cut short: by score, then by magnitude."""
        self._soften(0.0)
        is_ranked = not self._pools or self.rankings == self._last_ranking
        if not self.recipe.growth or (is_ranked and all(g.keep == self._budgets[g] for g in self._alone)):
            return
        self.rankings = -1
        self.follow(1.0)
        for group in self._budgets:
            group.resize(group.keep, group.pool({t: t.weight.detach().abs() for t in group.members}))


def _ahead(progress: float, end: float) -> float:
    """Return the share that is ahead of what goes from the start of the search to its progress ``end``."""
    return max(0.0, 1 - progress / end) if end else 0.0


def _unit(group: ScoreGroup, ratio: float, grown: float) -> Unit:
    """Describe a group of a pool of this sparse ratio, a part of whose zeros have grown."""
    highest = group.space.max_sparse_ratio
    return Unit(
        grains=group.grains.count,
        weights_per_grain=group.weights // group.grains.count,
        sparse_ratio=ratio * grown,
        min_sparse_ratio=(group.space.min_sparse_ratio or 0.0) * grown,
        max_sparse_ratio=min(1.0 if highest is None else highest, 1 - _FLOOR * (1 - ratio)),
        rows=group.grains.rows,
    )
