"""Initial masks given by the user, such as the masks of another pruner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nni_jackpot.errors import MaskError, NothingKeptError
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.masks import Masks, check_shape
from nni_jackpot.modules.parameters import join
from nni_jackpot.nni_bridge.grouping import TargetSpaces, by_name


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
