"""How many grains every unit keeps: the rules that share out the zeros before a search."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from nni_jackpot.masking.topk import check_order, keep_top
from nni_jackpot.runtime.registry import Registry

Key = TypeVar("Key", bound=Hashable)


def kept_count(numel: int, sparse_ratio: float) -> int:
    """Return how many of ``numel`` weights stay: all but ``int(sparse_ratio * numel)``."""
    return numel - int(sparse_ratio * numel)


@dataclass(frozen=True)
class Unit:
    """What has one tensor of scores: a target, or several that share scores (``dependency_group_id``).

    Parameters
    ----------
    grains
        How many scores there are; each stands for a grain: a weight, a channel or a block.
    weights_per_grain
        How many weights a grain has, over all targets of the unit.
    sparse_ratio
        Share of zeros that is asked for.
    min_sparse_ratio, max_sparse_ratio
        Bounds of the unit's own share of zeros, whatever the rule.
    shape
        Shape of the first target's weight; only `by_erdos_renyi_kernel` looks at it.
    rows
        The grains fall into so many blocks of equal length, each of which keeps the same number
        (``internal_metric_block``).
    """

    grains: int
    weights_per_grain: int
    sparse_ratio: float
    min_sparse_ratio: float = 0.0
    max_sparse_ratio: float = 1.0
    shape: tuple[int, ...] = ()
    rows: int = 1

    @property
    def kept_at_least(self) -> int:
        """Grains that ``max_sparse_ratio`` leaves."""
        return self.kept_at(self.max_sparse_ratio)

    @property
    def kept_at_most(self) -> int:
        """Grains that ``min_sparse_ratio`` leaves."""
        return self.kept_at(self.min_sparse_ratio)

    def kept_at(self, sparse_ratio: float) -> int:
        """Return how many grains stay at a sparse ratio, as many in every row."""
        return self.rows * kept_count(self.grains // self.rows, sparse_ratio)


Rule = Callable[[Mapping[Any, Unit], Mapping[Any, Tensor]], dict[Any, int]]


def as_configured(units: Mapping[Key, Unit], importance: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Give every unit its own sparse ratio, moved into its bounds (k of Eq. 5).

    Parameters
    ----------
    units
        Any number of units; none looks at the others.
    importance
        Not looked at.

    Returns
    -------
    dict
        Kept grains per unit, over all its rows.
    """
    return {
        key: unit.kept_at(min(unit.max_sparse_ratio, max(unit.min_sparse_ratio, unit.sparse_ratio)))
        for key, unit in units.items()
    }


def by_global_rank(units: Mapping[Key, Unit], importance: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Fix every unit's budget by one ranking over the whole group (the paper's global sparsity, Sec. 3.1).

    The least important of the group's grains are counted per unit, as many as the group's zeros allow; the
    counts, not the positions, are the result: each unit then keeps its own top-k (Eq. 5). The bounds of a
    unit hold exactly: they decide about its least and its most important grains, the ranking about the rest.
    Of equally important grains those of later units, then of higher index, go first.

    Parameters
    ----------
    units
        The units of one group, at least one.
    importance
        Initial importance of every unit's grains, any shape, comparable across the group.

    Returns
    -------
    dict
        Kept grains per unit, over all its rows; a unit may get none. If all grains are of one size and all
        ratios equal, without bounds and rows, they sum to ``K - int(sparse_ratio * K)`` of K grains.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN.
    """
    # The ranking is taken on one device and in one dtype, whatever the units' own.
    is_double = any(importance[key].dtype == torch.float64 for key in units)
    dtype = torch.float64 if is_double else torch.float32
    allowed = _zeros_of_group(units.values())
    counts = [unit.kept_at_most - unit.kept_at_least for unit in units.values()]
    contested = torch.empty(sum(counts), dtype=dtype)
    for (key, unit), part in zip(units.items(), contested.split(counts), strict=True):
        flat = importance[key].detach().reshape(-1).to("cpu", dtype)
        check_order(flat)
        if len(part) < unit.grains:
            # Without ``previous``, the smaller of two kept sets is part of the larger one.
            flat = flat[keep_top(flat, unit.kept_at_most) & ~keep_top(flat, unit.kept_at_least)]
        part.copy_(flat)
        allowed -= (unit.grains - unit.kept_at_most) * unit.weights_per_grain
    sizes = [unit.weights_per_grain for unit in units.values()]
    kept = _prune_least(contested, counts, sizes, max(0, allowed))

    budgets: dict[Key, int] = {}
    for (key, unit), part in zip(units.items(), kept.split(counts), strict=True):
        keep = unit.kept_at_least + int(part.count_nonzero())
        budgets[key] = keep + (unit.grains - keep) % unit.rows
    return budgets


def _zeros_of_group(units: Collection[Unit]) -> int:
    """Return how many weights of a group may become zero: ``int(p * K)`` grains' if all are of one kind."""
    kinds = {(unit.sparse_ratio, unit.weights_per_grain) for unit in units}
    if len(kinds) == 1:
        ((sparse_ratio, size),) = kinds
        return int(sparse_ratio * sum(unit.grains for unit in units)) * size
    return sum(int(unit.sparse_ratio * unit.grains) * unit.weights_per_grain for unit in units)


def _prune_least(importance: Tensor, counts: list[int], sizes: list[int], allowed: int) -> Tensor:
    """Return what is kept when the least important grains go, as many as have ``allowed`` weights at most.

    Parameters
    ----------
    importance
        Flat, of ``counts[0]`` grains of ``sizes[0]`` weights, then ``counts[1]`` of ``sizes[1]``, and so on.
    """
    if len(set(sizes)) == 1:
        n_pruned = min(importance.numel(), allowed // max(1, sizes[0]))
        return keep_top(importance, importance.numel() - n_pruned)
    # The reverse of the order in which `keep_top` keeps, ties included.
    rising = importance.argsort(descending=True, stable=True).flip(0)
    weights = torch.tensor(sizes).repeat_interleave(torch.tensor(counts))[rising]
    kept = torch.ones_like(importance, dtype=torch.bool)
    kept[rising[weights.cumsum(0) <= allowed]] = False
    return kept


def by_erdos_renyi_kernel(units: Mapping[Key, Unit], importance: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Give smaller units the higher densities, by the rule of Evci et al. (2020, "RigL", Sec. 3).

    The density of a unit is proportional to ``sum(shape) / prod(shape)``, which for matrices is the
    Erdős-Rényi rule. What a unit cannot take or give up, being dense or at a bound, is shared out over the
    others in the same proportion. The group as a whole keeps as many weights as by `as_configured`, or less
    than one grain of the largest unit fewer (one grain in each of its rows).

    Parameters
    ----------
    units
        The units of one group.
    importance
        Not looked at.

    Returns
    -------
    dict
        Kept grains per unit, over all its rows.
    """
    # In weights, and in fractions: no rounding error can tip the result.
    steps = {key: max(1, unit.weights_per_grain * unit.rows) for key, unit in units.items()}
    low = {key: Fraction(unit.kept_at_least * unit.weights_per_grain) for key, unit in units.items()}
    high = {key: Fraction(unit.kept_at_most * unit.weights_per_grain) for key, unit in units.items()}
    wishes = {
        key: Fraction(max(1, sum(unit.shape)) * unit.grains * unit.weights_per_grain, prod(unit.shape) or 1)
        for key, unit in units.items()
    }
    configured = as_configured(units, importance)
    target = Fraction(sum(configured[key] * unit.weights_per_grain for key, unit in units.items()))

    def share(key: Key, scale: Fraction) -> Fraction:
        return min(max(low[key], scale * wishes[key]), high[key])

    def total(scale: Fraction) -> Fraction:
        return sum((share(key, scale) for key in units), Fraction(0))

    # The total rises with the scale, in straight pieces between the scales at which a unit meets a bound.
    kinks = {bound / wishes[key] for key in units if wishes[key] for bound in (low[key], high[key])}
    scales = sorted({Fraction(0), *kinks})
    i = bisect_left(scales, target, key=total)
    scale = scales[i]
    if total(scale) > target:
        below = scales[i - 1]
        scale = below + (scale - below) * (target - total(below)) / (total(scale) - total(below))

    exact = {key: share(key, scale) / steps[key] for key in units}
    budgets = {key: int(exact[key]) for key in units}
    missing = target - sum(budgets[key] * steps[key] for key in units)
    for key in sorted(units, key=lambda key: budgets[key] - exact[key]):  # the largest remainder first
        if budgets[key] < exact[key] and steps[key] <= missing:
            budgets[key] += 1
            missing -= steps[key]
    return {key: keep * units[key].rows for key, keep in budgets.items()}


BUDGETS: Registry[Rule] = Registry("budget")
register_budget = BUDGETS.register

register_budget("as_configured")(as_configured)
register_budget("global_rank")(by_global_rank)
register_budget("erdos_renyi_kernel")(by_erdos_renyi_kernel)
