"""Where a search starts: how the zeros are shared out, and which grains given masks keep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.errors import MaskError, NothingKeptError
from nni_jackpot.masking.budgets import BUDGETS, Unit, by_global_rank
from nni_jackpot.masks import Masks
from nni_jackpot.nni_bridge.config_list import parse_pattern
from nni_jackpot.nni_bridge.grouping import TargetSpaces, by_name
from nni_jackpot.nni_bridge.targets import ScoredTarget, ScoreGroup

# -- budgets


def budgets_of(
    groups: Sequence[ScoreGroup], budget: str, importance: Mapping[ScoreGroup, Tensor]
) -> dict[ScoreGroup, int]:
    """Return how many grains each group keeps, each global group ranked as a whole.

    Parameters
    ----------
    groups
        All that is searched.
    budget
        Name of the rule for those in no global group, one of `nni_jackpot.masking.budgets.BUDGETS`.
    importance
        Of every grain, of the groups' score shapes.
    """
    budgets: dict[ScoreGroup, int] = {}
    together: dict[Any, list[ScoreGroup]] = defaultdict(list)
    for group in groups:
        if (pattern := group.space.setting.get("sparse_pattern")) is not None:
            budgets[group] = parse_pattern(pattern)[0] * group.grains.rows
        else:
            together[group.space.global_group_id].append(group)
    for global_id, members in together.items():
        rule = BUDGETS[budget] if global_id is None else by_global_rank
        units = {group: _unit_of(group, importance[group]) for group in members}
        budgets |= rule(units, {group: importance[group] for group in members})
    return {group: budgets[group] for group in groups}


def check_budgets(budgets: Mapping[ScoreGroup, int]) -> None:
    """Raise NothingKeptError if a group keeps nothing."""
    for group, keep in budgets.items():
        if keep == 0:
            raise NothingKeptError(
                f"none of the {group.grains.count * group.grains.size} weights of {group} would be kept "
                f"at sparse_ratio {group.space.sparse_ratio}: lower it, exclude "
                f"{group.members[0].module_name} from the config list, or take it out of its "
                "global_group_id"
            )


def pools_of(groups: Sequence[ScoreGroup], budget: str) -> list[list[ScoreGroup]]:
    """Return the groups in pools that share a budget; arguments as for `budgets_of`."""
    pools: dict[Any, list[ScoreGroup]] = defaultdict(list)
    for group in groups:
        is_ranked = group.space.global_group_id is not None or budget == "global_rank"
        is_pattern = group.space.setting.get("sparse_pattern") is not None
        pools[group.space.global_group_id if is_ranked and not is_pattern else group].append(group)
    return list(pools.values())


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


# -- given masks


def kept_by(masks: Masks, groups: Sequence[ScoreGroup], spaces: TargetSpaces) -> dict[ScoreGroup, Tensor]:
    """Return which grains given masks keep, boolean, of the score shape, of every group that they name.

    Raises
    ------
    MaskError
        If a mask is for no target of ``spaces``, does not fit its target, or differs from another of its
        group.
    NothingKeptError
        If the mask of a searched target keeps nothing.
    """
    searched = by_name(groups, spaces)
    for module_name, module_masks in masks.items():
        for name, mask in module_masks.items():
            space = spaces.get(module_name, {}).get(name)
            if space is None:
                raise MaskError(f"{module_name}.{name} is no target of this pruner")
            if mask is not None and list(mask.shape) != space.shape:
                shapes = f"shape {list(mask.shape)}, its target {space.shape}"
                raise MaskError(f"the mask of {module_name}.{name} has {shapes}")
            if (target := searched.get((module_name, name))) is None:
                continue
            if mask is None or not mask.any():
                raise NothingKeptError(f"the mask of {target} keeps nothing")
            _check_structure(target, mask)
    starts: dict[ScoreGroup, Tensor] = {}
    group_of = {id(target.space): group for group in groups for target in group.members}
    for (module_name, name), target in searched.items():
        mask = masks.get(module_name, {}).get(name)
        if mask is None:
            continue
        group = group_of[id(target.space)]
        device = group.members[0].weight.device
        kept = target.grains.of_mask(mask).view(group.grains.score_shape).to(device)
        if not torch.equal(starts.setdefault(group, kept), kept):
            raise MaskError(
                f"the masks of {group} differ, but they share one dependency_group_id or one parameter"
            )
    return {group: starts[group] for group in groups if group in starts}


def _check_structure(target: ScoredTarget, mask: Tensor) -> None:
    """A mask must keep whole grains, and as many in every row, or there is no score that stands for it.

    Raises
    ------
    MaskError
        If it does not.
    """
    grains = target.grains
    kept = grains.of_mask(mask)
    if not torch.equal(grains.expand(kept).expand(grains.shape), mask.bool()):
        raise MaskError(f"the mask of {target} cuts through its granularity {target.space.granularity!r}")
    if not torch.equal(grains.select(kept.float(), int(kept.sum())), kept):
        raise MaskError(f"the mask of {target} does not keep as many in each of its {grains.rows} rows")
