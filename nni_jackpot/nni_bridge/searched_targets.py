"""The targets of a pruner: their initial masks, their budgets, and masks given from outside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.errors import ConfigListError, MaskError, NothingKeptError
from nni_jackpot.masking.budgets import Rule, criterion_of_budget
from nni_jackpot.masking.criteria import Criterion, needs_of
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.methods import Method
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.masks import Masks, check_shape
from nni_jackpot.modules.parameters import join
from nni_jackpot.nni_bridge.calibration import layers_of
from nni_jackpot.nni_bridge.grouping import TargetSpaces, by_name
from nni_jackpot.search.initial_masks import budget_groups_of, budgets_of, check_budgets

EvidenceOf = Callable[[str, Mapping[MaskedParameter, Tensor]], Any]
"""Returns the evidence of a kind (`nni_jackpot.masking.criteria.EVIDENCE`) about weights."""

# What NNI's scheduled pruners change during a search.
_GOALS = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio")


class SearchedTargets:
    """All that a pruner searches.

    Parameters
    ----------
    groups
        The targets, in groups that share scores.
    spaces
        NNI's target spaces, by module and target name.
    method
        Settings of the search.
    budget
        How zeros are shared out among targets without a global group.
    criterion
        The initial criterion; None if the masks are given.

    Attributes
    ----------
    importance
        Importance of every grain by the initial criterion; None if the masks were given.
    importance_to_budget
        Importance of every grain by the criterion that the budget needs; mostly the same.
    """

    def __init__(
        self,
        groups: list[ScoreGroup],
        spaces: TargetSpaces,
        method: Method,
        budget: Rule,
        criterion: Criterion | None,
    ) -> None:
        self.groups = groups
        self.importance: dict[ScoreGroup, Tensor] | None = None
        self.importance_to_budget: dict[ScoreGroup, Tensor] | None = None
        self._criterion = criterion
        self._spaces = spaces
        self._method = method
        self._budget = budget
        self._goals = self._current_goals()

    @property
    def parameters(self) -> list[MaskedParameter]:
        """The searched parameters."""
        return [member for group in self.groups for member in group.members]

    @property
    def budget_groups(self) -> list[list[ScoreGroup]]:
        """The groups that share a budget together."""
        return budget_groups_of(self.groups, self._budget)

    @property
    def _criteria(self) -> list[Criterion]:
        """The initial criterion, and the one that the budget needs; none if the masks are given."""
        if self._criterion is None:
            return []
        by_budget = criterion_of_budget(self._budget)
        return [self._criterion] if by_budget in (None, self._criterion) else [self._criterion, by_budget]

    @property
    def needs_data(self) -> bool:
        """Whether initial masks and budgets depend on more than weights."""
        return any(needs_of(criterion) != "weights" for criterion in self._criteria)

    def check(self) -> None:
        """Check that method and criteria fit the targets; raises ConfigListError."""
        for criterion in self._criteria:
            self.check_criterion(criterion)
        for group in self.groups:
            if self._method.schedule.swap_limit is not None and group.grains.rows > 1:
                raise ConfigListError(
                    f"swap_limit does not go with the sparse_pattern or internal_metric_block of {group}: "
                    "limited swaps do not keep the number of each row"
                )

    def check_criterion(self, criterion: Criterion) -> None:
        """Check that all targets have the evidence that a criterion needs; raises ConfigListError."""
        needs = needs_of(criterion)
        for parameter in self.parameters:
            if needs == "losses" and not isinstance(parameter.weight, nn.Parameter):
                raise ConfigListError(
                    f"{parameter} is computed by a parametrization, and the criterion "
                    f"{_name_of(criterion)} takes gradients of parameters: start from 'magnitude', 'random' "
                    "or masks"
                )
            if needs in ("activations", "hessians"):
                layers_of(parameter)

    def start(self, evidence_of: EvidenceOf) -> None:
        """Set budgets, initial masks and scores by the initial criterion.

        Parameters
        ----------
        evidence_of
            Returns the evidence that criteria need.

        Raises
        ------
        ValueError
            If a criterion returns something else than a tensor of the weight's shape for each target.
        NothingKeptError
            If a target would keep nothing.
        """
        found = [self._importance_by(criterion, evidence_of) for criterion in self._criteria]
        self.importance, self.importance_to_budget = found[0], found[-1]
        budgets = self._budgets()
        check_budgets(budgets)
        for group, keep in budgets.items():
            self._set_initial(group, group.grains.select(self.importance[group], keep))

    def _importance_by(self, criterion: Criterion, evidence_of: EvidenceOf) -> dict[ScoreGroup, Tensor]:
        """Return the importance of every grain."""
        weights = {parameter: parameter.weight for parameter in self.parameters}
        needs = needs_of(criterion)
        evidence = [] if needs == "weights" else [evidence_of(needs, weights)]
        importance = criterion(weights, *evidence)
        for parameter, weight in weights.items():
            found = importance.get(parameter) if isinstance(importance, Mapping) else None
            if not isinstance(found, Tensor) or found.shape != weight.shape:
                raise ValueError(
                    f"the criterion {_name_of(criterion)} must return a tensor of shape "
                    f"{list(weight.shape)} for {parameter}, got {_shown(found)}"
                )
        return {group: group.reduce(importance) for group in self.groups}

    def _budgets(self) -> dict[ScoreGroup, int]:
        assert self.importance is not None
        assert self.importance_to_budget is not None
        return budgets_of(
            self.groups,
            self._budget,
            self.importance,
            self.importance_to_budget,
            self._method.schedule.reallocate,
        )

    def forget_importance(self) -> None:
        """Free the memory of the importance: no budget will change."""
        self.importance = self.importance_to_budget = None

    def start_from(self, masks: Masks) -> dict[str, dict[str, Tensor | None]]:
        """Return the masks of all targets out of given ones; raises MaskError if one is missing."""
        starts: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
        missing = {str(parameter) for parameter in self.parameters}
        for (module_name, name), parameter in self._by_name().items():
            if (mask := masks.get(module_name, {}).get(name)) is not None:
                starts[module_name][name] = mask
                missing.discard(str(parameter))
        if missing:
            raise MaskError(f"init has no mask for {', '.join(sorted(missing))}")
        return starts

    def set_masks(self, masks: Masks) -> dict[str, dict[str, Tensor | None]]:
        """Set the masks of targets, their budgets and scores; return the masks of what is not searched.

        Raises
        ------
        MaskError
            If a mask is not for a target, or does not fit its target.
        NothingKeptError
            If a mask keeps nothing.
        """
        for group, kept in kept_by(masks, self.groups, self._spaces).items():
            self._set_initial(group, kept)
        searched = self._by_name()
        rest: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
        for module_name, module_masks in masks.items():
            for name, mask in module_masks.items():
                if (module_name, name) not in searched:
                    rest[module_name][name] = mask
        return rest

    def follow_goals(self) -> None:
        """Change budgets if a scheduled pruner (NNI's AGPPruner) has changed sparse ratios."""
        goals = self._current_goals()
        if goals == self._goals:
            return
        self._goals = goals
        if self.importance is None:
            raise ConfigListError(
                "sparse ratios cannot be scheduled where the search starts from given masks, nor after a "
                "search without a schedule"
            )
        for group, keep in self._budgets().items():
            group.prune_to(keep, self.importance[group])

    def _set_initial(self, group: ScoreGroup, kept: Tensor) -> None:
        group.set_initial(kept, *self._method.initial_scores)
        group.limit_swaps(self._method.schedule.swap_limit)

    def _by_name(self) -> dict[tuple[str, str], MaskedParameter]:
        return by_name(self.groups, self._spaces)

    def _current_goals(self) -> list[tuple[float | None, ...]]:
        return [tuple(group.space.setting.get(key) for key in _GOALS) for group in self.groups]


def _name_of(criterion: object) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _shown(found: object) -> str:
    return f"one of shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)[:100]


def kept_by(masks: Masks, groups: Sequence[ScoreGroup], spaces: TargetSpaces) -> dict[ScoreGroup, Tensor]:
    """Return the grains that given masks keep, boolean, in the score shape, for each group with a mask.

    Raises
    ------
    MaskError
        If a mask belongs to no target of ``spaces``, does not fit its target, or differs from another mask of
        its group.
    NothingKeptError
        If the mask of a searched target keeps nothing.
    """
    searched = by_name(groups, spaces)
    for module_name, module_masks in masks.items():
        for name, mask in module_masks.items():
            space = spaces.get(module_name, {}).get(name)
            if space is None:
                raise MaskError(f"{module_name}.{name} is not a target of this pruner")
            if mask is not None:
                check_shape(join(module_name, name), mask, space.shape)
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


def _check_structure(target: MaskedParameter, mask: Tensor) -> None:
    """Check that scores can represent a mask: it keeps whole grains, equally many in every row.

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
        raise MaskError(f"the mask of {target} does not keep equally many in each of its {grains.rows} rows")
