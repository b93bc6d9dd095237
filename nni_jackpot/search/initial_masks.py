"""Where a search starts: how many grains each group keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nni_jackpot.errors import NothingKeptError
from nni_jackpot.masking.budgets import Rule, Unit, by_global_rank
from nni_jackpot.masking.granularity import parse_pattern
from nni_jackpot.masking.score_groups import ScoreGroup


def budgets_of(
    groups: Sequence[ScoreGroup],
    budget: Rule,
    importance: Mapping[ScoreGroup, Tensor],
    importance_to_budget: Mapping[ScoreGroup, Tensor],
) -> dict[ScoreGroup, int]:
    """Return how many grains each group keeps, each global group ranked as a whole.

    Parameters
    ----------
    groups
        All that is searched.
    budget
        Rule for the groups without a global group (`nni_jackpot.masking.budgets`).
    importance
        Of every grain, of the groups' score shapes; ranks global groups, and gives thresholds.
    importance_to_budget
        The same by the criterion that the budget needs.
    """
    budgets: dict[ScoreGroup, int] = {}
    together: dict[Any, list[ScoreGroup]] = defaultdict(list)
    for group in groups:
        if (pattern := group.space.setting.get("sparse_pattern")) is not None:
            budgets[group] = parse_pattern(pattern)[0] * group.grains.rows
        else:
            together[group.space.global_group_id].append(group)
    for global_id, members in together.items():
        rule, evidence = budget, importance_to_budget
        if global_id is not None:
            rule, evidence = by_global_rank, importance
        units = {group: _unit_of(group, importance[group]) for group in members}
        budgets |= rule(units, {group: evidence[group] for group in members})
    return {group: budgets[group] for group in groups}


def check_budgets(budgets: Mapping[ScoreGroup, int]) -> None:
    """Raise NothingKeptError if a group keeps nothing."""
    for group, keep in budgets.items():
        if keep == 0:
            raise NothingKeptError(
                f"none of the {group.grains.count * group.grains.size} weights of {group} would be kept "
                f"at sparse_ratio {group.space.sparse_ratio}: lower it, exclude "
                f"{group.members[0].module_name} from the config list, give its entry a max_sparse_ratio "
                "below 1, or take it out of its global_group_id"
            )


def budget_groups_of(groups: Sequence[ScoreGroup], budget: Rule) -> list[list[ScoreGroup]]:
    """Return the groups that share a budget together; arguments as for `budgets_of`."""
    shared: dict[Any, list[ScoreGroup]] = defaultdict(list)
    for group in groups:
        is_ranked = group.space.global_group_id is not None or budget is by_global_rank
        is_pattern = group.space.setting.get("sparse_pattern") is not None
        shared[group.space.global_group_id if is_ranked and not is_pattern else group].append(group)
    return list(shared.values())


def _unit_of(group: ScoreGroup, importance: Tensor) -> Unit:
    """Describe a group to the rules of budgets."""
    space, grains = group.space, group.grains
    low, high = space.min_sparse_ratio or 0.0, space.max_sparse_ratio
    ratio = space.sparse_ratio
    if ratio is None:  # a threshold on the importance: the budget is what it leaves (NNI's sparse_threshold)
        below = int((importance < space.sparse_threshold).sum())
        # Half a grain more, so that ``int`` finds the count again.
        ratio = min((below + 0.5) / grains.count, 1.0)
    return Unit(
        grains=grains.count,
        weights_per_grain=group.weights // max(1, group.grains.count),
        sparse_ratio=ratio,
        min_sparse_ratio=low,
        max_sparse_ratio=1.0 if high is None else high,
        shape=grains.shape,
        rows=grains.rows,
    )
