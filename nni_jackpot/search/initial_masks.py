"""Where a search starts: how many grains each group keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nni_jackpot.errors import NothingKeptError
from nni_jackpot.masking.budgets import Rule, Unit, by_global_rank, with_floors
from nni_jackpot.masking.granularity import parse_pattern
from nni_jackpot.masking.score_groups import ScoreGroup


def budgets_of(
    groups: Sequence[ScoreGroup],
    budget: Rule,
    importance: Mapping[ScoreGroup, Tensor],
    importance_to_budget: Mapping[ScoreGroup, Tensor],
    reallocates: bool,
) -> dict[ScoreGroup, int]:
    """Return how many grains each group keeps, each global group ranked as a whole.

    A search that reallocates weights starts, as it ends, with no layer below a tenth of the density of its
    global group. The paper's ranking has no such floor.

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
    reallocates
        Whether the search reallocates weights among the targets of a global group.
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
        units = {group: unit_of(group, _ratio_of(group, importance[group])) for group in members}
        if reallocates and rule is by_global_rank:
            units = with_floors(units)
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


def _ratio_of(group: ScoreGroup, importance: Tensor) -> float:
    """Return the sparse ratio of a group; of a threshold on the importance, the share that it leaves out."""
    if group.space.sparse_ratio is not None:
        return group.space.sparse_ratio
    below = int((importance < group.space.sparse_threshold).sum())
    # Half a grain more, so that ``int`` finds the count again.
    return min((below + 0.5) / group.grains.count, 1.0)


def unit_of(group: ScoreGroup, sparse_ratio: float) -> Unit:
    """Describe a group of a sparse ratio to the rules of budgets."""
    grains, high = group.grains, group.space.max_sparse_ratio
    return Unit(
        grains=grains.count,
        weights_per_grain=group.weights // max(1, grains.count),
        sparse_ratio=sparse_ratio,
        min_sparse_ratio=group.space.min_sparse_ratio or 0.0,
        max_sparse_ratio=1.0 if high is None else high,
        shape=grains.shape,
        rows=grains.rows,
    )
