"""How many grains every unit keeps: the rules that share out the zeros before a search."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from nni_jackpot.masking.criteria.registry import CRITERIA, Criterion, declared_needs
from nni_jackpot.masking.topk import check_order, keep_top
from nni_jackpot.runtime.registry import Registry

Key = TypeVar("Key", bound=Hashable)

# Lowest density of a unit relative to its group, where a search reallocates weights.
_FLOOR = 0.1


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
        Number of rows of equal length; each row keeps the same number of grains (``internal_metric_block``).
    """

    grains: int
    weights_per_grain: int
    sparse_ratio: float
    min_sparse_ratio: float = 0.0
    max_sparse_ratio: float = 1.0
    shape: tuple[int, ...] = ()
    rows: int = 1

    def with_floor(self, sparse_ratio: float) -> Unit:
        """Return the unit with a bound of a tenth of the density of its group, whose share of zeros is given.

        No layer then loses all its weights to others. The unit's own bounds go first.
        """
        highest = max(self.min_sparse_ratio, 1 - _FLOOR * (1 - sparse_ratio))
        return replace(self, max_sparse_ratio=min(self.max_sparse_ratio, highest))

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
"""Units and the importance of their grains in, the number of grains that each unit keeps out."""

BUDGETS: Registry[Rule] = Registry("budget")

R = TypeVar("R", bound=Rule)


def register_budget(name: str, needs: str | None = None) -> Callable[[R], R]:
    """Return a decorator that registers a budget under a name.

    Parameters
    ----------
    name
        The name.
    needs
        The criterion whose importance the budget is called with, by name, such as ``"wanda"``; its evidence
        is collected for the budget. None for the importance by the initial criterion.

    Raises
    ------
    ValueError
        If the name is taken, or there is no such criterion.
    """
    if needs is not None:
        CRITERIA.find(needs)
    return BUDGETS.register(name, needs=needs)


def criterion_of_budget(rule: Rule) -> Criterion | None:
    """Return the criterion whose importance a budget needs; None for the initial criterion.

    Raises
    ------
    ValueError
        If the budget declares a criterion that does not exist.
    """
    needs = declared_needs(rule)
    return None if needs is None else CRITERIA.find(needs)


@register_budget("as_configured")
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


@register_budget("global_rank")
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


def with_floors(units: Mapping[Key, Unit]) -> dict[Key, Unit]:
    """Return units with the bound of `Unit.with_floor`, if the weights of the group suffice for it."""
    size = sum(unit.grains * unit.weights_per_grain for unit in units.values())
    zeros = _zeros_of_group(units.values())
    floored = {key: unit.with_floor(zeros / max(1, size)) for key, unit in units.items()}
    least = sum(unit.kept_at_least * unit.weights_per_grain for unit in floored.values())
    return floored if least <= size - zeros else dict(units)


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


@register_budget("erdos_renyi_kernel")
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
    wishes = {
        key: Fraction(max(1, sum(unit.shape)) * unit.grains * unit.weights_per_grain, prod(unit.shape) or 1)
        for key, unit in units.items()
    }
    return _share_out(units, dict.fromkeys(units, Fraction(0)), wishes)


def _share_out(
    units: Mapping[Key, Unit], offsets: Mapping[Key, Fraction], slopes: Mapping[Key, Fraction]
) -> dict[Key, int]:
    """Return kept grains by shares ``offset + x * slope`` within bounds, with the total of `as_configured`.

    Parameters
    ----------
    units
        The units of one group.
    offsets, slopes
        In weights; slopes are not negative. The number ``x`` is the one that gives the total.
    """
    # In weights, and in fractions: no rounding error can tip the result.
    steps = {key: max(1, unit.weights_per_grain * unit.rows) for key, unit in units.items()}
    low = {key: Fraction(unit.kept_at_least * unit.weights_per_grain) for key, unit in units.items()}
    high = {key: Fraction(unit.kept_at_most * unit.weights_per_grain) for key, unit in units.items()}
    configured = as_configured(units, {})
    target = Fraction(sum(configured[key] * unit.weights_per_grain for key, unit in units.items()))

    def share(key: Key, x: Fraction) -> Fraction:
        return min(max(low[key], offsets[key] + x * slopes[key]), high[key])

    def total(x: Fraction) -> Fraction:
        return sum((share(key, x) for key in units), Fraction(0))

    # The total rises with x, in straight pieces between the values at which a unit meets a bound.
    bounded = ((key, bound) for key in units if slopes[key] for bound in (low[key], high[key]))
    kinks = sorted({Fraction(0), *((bound - offsets[key]) / slopes[key] for key, bound in bounded)})
    i = bisect_left(kinks, target, key=total)
    x = kinks[i]
    if total(x) > target:
        below = kinks[i - 1]
        x = below + (x - below) * (target - total(below)) / (total(x) - total(below))

    exact = {key: share(key, x) / steps[key] for key in units}
    budgets = {key: int(exact[key]) for key in units}
    missing = target - sum(budgets[key] * steps[key] for key in units)
    for key in sorted(units, key=lambda key: budgets[key] - exact[key]):  # the largest remainder first
        if budgets[key] < exact[key] and steps[key] <= missing:
            budgets[key] += 1
            missing -= steps[key]
    return {key: keep * units[key].rows for key, keep in budgets.items()}


@register_budget("owl", needs="wanda")
def by_outliers(
    units: Mapping[Key, Unit],
    importance: Mapping[Key, Tensor],
    threshold: float = 5.0,
    span: float = 0.08,
) -> dict[Key, int]:
    """Give units with more outliers among their importances the higher densities (OWL).

    Yin et al., "Outlier Weighed Layerwise Sparsity" (ICML 2024). The outlier ratio ``D`` of a unit is its
    share of grains whose Wanda importance exceeds ``threshold`` times the unit's mean. Its density is the
    configured one plus ``2 * span * (D - min D) / (max D - min D) - c``: the densities differ by
    ``2 * span`` at most. The number ``c`` keeps the total of weights, whereas the paper keeps the mean of the
    densities, which is the same for units of one size. The paper's experiments give all matrices of a
    transformer block one ratio; here every unit has its own. Bounds, rows and rounding are as for
    `by_erdos_renyi_kernel`.

    Parameters
    ----------
    units
        The units of one group.
    importance
        Of every unit's grains, by Wanda, any shape.
    threshold
        Multiple of the mean above which a grain is an outlier (M in the paper).
    span
        Half the largest difference between densities (lambda in the paper).

    Returns
    -------
    dict
        Kept grains per unit, over all its rows.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN.
    """
    ratios = {key: _share_of_outliers(importance[key], threshold) for key in units}
    found = [ratios[key] for key, unit in units.items() if unit.grains]
    least, most = min(found, default=Fraction(0)), max(found, default=Fraction(0))
    sizes = {key: Fraction(unit.grains * unit.weights_per_grain) for key, unit in units.items()}
    configured = as_configured(units, importance)
    offsets = {}
    for key, unit in units.items():
        extra = 2 * Fraction(span) * (ratios[key] - least) / ((most - least) or 1)
        offsets[key] = configured[key] * unit.weights_per_grain + extra * sizes[key]
    return _share_out(units, offsets, sizes)


def _share_of_outliers(importance: Tensor, threshold: float) -> Fraction:
    flat = importance.detach().reshape(-1).double()
    check_order(flat)
    outliers = int((flat > threshold * flat.mean()).sum())
    return Fraction(outliers, max(1, flat.numel()))


@register_budget("lamp", needs="magnitude")
def by_lamp(units: Mapping[Key, Unit], importance: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Rank all grains by their squared magnitude relative to that of the larger ones of their unit (LAMP).

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021): the score of a
    grain is ``w_u^2 / sum of w_v^2``, over itself and the grains of its unit that are kept longer. A unit's
    last grain has score 1, so that no unit is emptied before all others have one grain left. The scores
    decide the number of each unit, by `by_global_rank`: its bounds, rows and total hold.

    Parameters
    ----------
    units
        The units of one group, at least one.
    importance
        Magnitude of every unit's grains, any shape.

    Returns
    -------
    dict
        Kept grains per unit, over all its rows.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN.
    """
    return by_global_rank(units, {key: _lamp_scores(importance[key]) for key in units})


def _lamp_scores(importance: Tensor) -> Tensor:
    flat = importance.detach().reshape(-1).double()
    check_order(flat)
    # Largest first; among equal ones the lower index is kept longer, as in `keep_top`.
    squares, order = flat.square().sort(descending=True, stable=True)
    scores = torch.empty_like(flat)
    scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(flat.dtype).tiny)
    return scores
