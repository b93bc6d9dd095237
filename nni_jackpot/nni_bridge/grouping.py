"""Groups of NNI's target spaces: which targets share scores, and which masks follow other masks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.tools.utils import is_active_target
from torch import nn

from nni_jackpot.errors import ConfigListError
from nni_jackpot.masking.granularity import Grains, parse_pattern
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.modules.layouts import is_transposed, layout_of
from nni_jackpot.nni_bridge.aligned_mask import align
from nni_jackpot.nni_bridge.channels import channels_of, scaling_of, steps_of
from nni_jackpot.nni_bridge.config_list import has_align_of_its_own
from nni_jackpot.nni_bridge.wrapper import SearchedWrapper, TiedSpace

TargetSpaces = Mapping[str, Mapping[str, PruningTargetSpace]]


def tie(spaces: TargetSpaces, wrappers: Mapping[str, ModuleWrapper]) -> None:
    """Give targets that are one tied parameter one score and one mask: those of the first in model order.

    Raises
    ------
    ConfigListError
        If the config list has different settings for them.
    """
    first: dict[int, tuple[str, PruningTargetSpace]] = {}
    for module_name, wrapper in wrappers.items():
        for name, space in wrapper.pruning_target_spaces.items():
            parameter = wrapper.module._parameters.get(name)
            if parameter is None:
                continue
            where = f"{module_name}.{name}"
            other, primary = first.setdefault(id(parameter), (where, space))
            if primary is space or isinstance(space, TiedSpace):
                continue
            if primary._setting != space._setting or module_name not in spaces:
                raise ConfigListError(
                    f"{other} and {where} are one parameter, but their settings in the config list differ: "
                    f"{_settings(primary)} and {_settings(space)}; select one of them, or set both alike"
                )
            del wrapper._parameters[name], wrapper._buffers[space._mask_name]
            space.__class__, space.primary = TiedSpace, primary


def _settings(space: PruningTargetSpace) -> dict[str, Any]:
    return {key: value for key, value in space._setting.items() if value not in (None, "default")}


def group_targets(
    spaces: TargetSpaces, wrappers: Mapping[str, ModuleWrapper], kind: type[MaskedParameter]
) -> list[ScoreGroup]:
    """Find the targets that are searched, and those that share scores (``dependency_group_id``).

    Parameters
    ----------
    spaces, wrappers
        NNI's target spaces and wrappers, by module name.
    kind
        Class of the searched parameters.

    Raises
    ------
    ConfigListError
        If a granularity or an ``internal_metric_block`` does not divide its target, or the members of a
        dependency group do not fit each other.
    """
    by_id: dict[Any, list[tuple[str, str, PruningTargetSpace]]] = defaultdict(list)
    for module_name, module_spaces in spaces.items():
        for name, space in module_spaces.items():
            if is_active_target(space) and not isinstance(space, TiedSpace):
                shared = space.dependency_group_id
                by_id[(module_name, name) if shared is None else shared].append((module_name, name, space))
    groups = []
    for members in by_id.values():
        rows = math.lcm(*(space.internal_metric_block or 1 for _, _, space in members))
        targets = [
            kind(m, name, space, _grains(f"{m}.{name}", wrappers[m].module, space, rows))
            for m, name, space in members
        ]
        groups.append(ScoreGroup(targets))
        _check_members(groups[-1])
    # Drawn aside: random masks and the order of the data are the same under any method.
    with torch.random.fork_rng(devices=()):
        seeds = torch.randint(1 << 62, (len(groups),)).tolist()
    for group, seed in zip(groups, seeds, strict=True):
        for member in group.members:
            member.seed = seed
    return groups


def _grains(where: str, module: nn.Module, space: PruningTargetSpace, rows: int) -> Grains:
    shape = tuple(space.shape)
    pattern = space.setting.get("sparse_pattern")
    if pattern is not None:
        row_dim = layout_of(module, where.rpartition(".")[2]).input_dim
        return Grains(shape, rows=math.prod(shape) // parse_pattern(pattern)[1], row_dim=row_dim)
    grains = Grains(shape, space._scaler, rows)
    if grains.count * grains.size != math.prod(shape):
        raise ConfigListError(f"{where}: granularity={space.granularity!r} does not divide its shape {shape}")
    if grains.count % rows:
        raise ConfigListError(f"{where}: internal_metric_block {rows} does not divide {grains.count} grains")
    return grains


def _check_members(group: ScoreGroup) -> None:
    """Check that targets with common scores have the same number of grains and the same settings."""
    first = group.members[0]
    keys = ("sparse_threshold", "global_group_id", "min_sparse_ratio", "max_sparse_ratio")
    for other in group.members[1:]:
        if other.grains.count != first.grains.count:
            raise ConfigListError(
                f"{first} and {other} share a dependency_group_id but have {first.grains.count} and "
                f"{other.grains.count} grains; give them granularity='out_channel'"
            )
        for key in keys:
            if getattr(other.space, key) != getattr(first.space, key):
                raise ConfigListError(f"{first} and {other} share a dependency_group_id but differ in {key}")


def by_name(groups: Sequence[ScoreGroup], spaces: TargetSpaces) -> dict[tuple[str, str], MaskedParameter]:
    """Return the searched parameters by module and target name; a tied parameter under each of its names."""
    targets = {id(target.space): target for group in groups for target in group.members}
    return {
        (module_name, name): target
        for module_name, module_spaces in spaces.items()
        for name, space in module_spaces.items()
        if (target := targets.get(id(getattr(space, "primary", space)))) is not None
    }


def single_weights(groups: Sequence[ScoreGroup], spaces: TargetSpaces) -> list[tuple[str, str]]:
    """Return module and name of each target; raises ConfigListError for others than single weights."""
    for group in groups:
        grains = group.grains
        if len(group.members) > 1 or grains.scaler is not None or grains.rows > 1:
            raise ConfigListError(
                f"{group} has a granularity, sparse_pattern or dependency_group_id; a training prunes single "
                "weights"
            )
        if not isinstance(group.members[0].weight, nn.Parameter):
            raise ConfigListError(f"{group} is computed by a parametrization; a training prunes parameters")
    return list(by_name(groups, spaces))


def align_targets(
    groups: Sequence[ScoreGroup], spaces: TargetSpaces, wrappers: Mapping[str, ModuleWrapper]
) -> None:
    """Make masks of aligned targets follow the masks of their sources (NNI's ``align``).

    Raises
    ------
    ConfigListError
        If a source is not searched, or its dimensions do not give the target's shape.
    """
    searched = by_name(groups, spaces)
    for module_name, module_spaces in spaces.items():
        wrapper = wrappers[module_name]
        for name, space in module_spaces.items():
            # With both a ratio and an align NNI prunes by ratio; and a module may have no bias.
            absent = space.type is TargetType.PARAMETER and space.target is None
            if space.align is None or (module_name, name) in searched or absent:
                continue
            own = any(has_align_of_its_own(entry, name) for entry in wrapper.configs["pruning"])
            source_key = (space.align["module_name"] or module_name, space.align["target_name"])
            source = searched.get(source_key)
            if not own and (source is None or source.grains.scaler is None):
                continue  # a bias stays whole where single weights are searched
            where = f"{module_name}.{name}"
            if source is None:
                raise ConfigListError(f"{where}: align names {'.'.join(source_key)}, which is not searched")
            dims = tuple(space.align["dims"])
            if not own and is_transposed(wrapper.module):
                dims = (1,)
            shape = source.grains.shape
            what, sizes = _followed(where, wrapper.module, name, space)
            fits = all(isinstance(dim, int) and -len(shape) <= dim < len(shape) for dim in dims)
            given = [shape[dim] for dim in sorted({dim % len(shape) for dim in dims})] if fits else None
            if given is None or sizes not in (None, given):
                raise ConfigListError(
                    f"{where}: align to dims {list(dims)} of {source}, of shape {shape}, does not give its "
                    f"{what}"
                )
            holders = wrapper.holders.get(name, ()) if isinstance(wrapper, SearchedWrapper) else ()
            if isinstance(space, TiedSpace) or len(holders) > 1:
                raise ConfigListError(
                    f"{where} is a parameter of several modules, and cannot follow the mask of one of them: "
                    "leave it out by target_names"
                )
            align(space, source.space, dims)


def _followed(
    where: str, module: nn.Module, name: str, space: PruningTargetSpace
) -> tuple[str, list[int] | None]:
    """Return in words what follows another mask, and its sizes; None if only a forward shows the sizes."""
    if space.type is TargetType.PARAMETER:
        what, shape = f"shape {space.shape}", list(space.shape)
        steps = len(shape) * [1] if space._scaler is None else steps_of(space._scaler, len(shape))
    elif (channels := channels_of(module, name)) is not None:
        what, shape = f"{channels.number} channels", [channels.number]
        space._scaler = scaling_of(where, module, name, space.setting)
        steps = space._scaler.kernel_size[-1:]
    else:
        return "shape", None
    if any(size % step for size, step in zip(shape, steps, strict=True)):
        raise ConfigListError(f"{where}: granularity={space.granularity!r} does not divide its {what}")
    if space.granularity is not None:
        what += f" at granularity={space.granularity!r}"
    return what, [size // step for size, step in zip(shape, steps, strict=True) if step != -1]
