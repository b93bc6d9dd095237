"""Validation of NNI config lists against the model, before anything is wrapped.

NNI reports a bad config list by an assertion deep inside, or not at all (an entry that matches nothing). This
module checks every entry first, with NNI's own selectors, settings and schema, and raises one clear error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting, canonicalize_settings
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.tools.utils import is_active_target
from schema import SchemaError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nni_jackpot.errors import (
    ConfigListError,
    EmptyMatchError,
    SparseRatioError,
    TargetWithoutParametersError,
)
from nni_jackpot.masking.granularity import parse_pattern
from nni_jackpot.modules.layouts import layout_of
from nni_jackpot.modules.parameters import check_initialized, check_maskable
from nni_jackpot.nni_bridge.channels import check_granularity, scaling_of
from nni_jackpot.nni_bridge.selected import (
    SELECTING_KEYS,
    Entry,
    resolve,
    unnamed_weights,
    without_selection,
)

_logger = logging.getLogger(__name__)

_LEGACY_KEYS = {"exclude", "sparsity", "sparsity_per_layer", "total_sparsity", "op_partial_names"}
_PREFIXES = (INPUT_PREFIX, OUTPUT_PREFIX)
_BOUNDS = {"min_sparse_ratio", "max_sparse_ratio"}
_LEGACY_RATIO_KEYS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_RATIO_KEYS = ("sparse_ratio", *_LEGACY_RATIO_KEYS)
# Keys that NNI overwrites when it translates legacy keys.
_LOST_WITH_LEGACY_KEYS = ("granularity", "target_names", "target_settings")
# Keys allowed for a target without a sparse ratio, whose mask follows another target's mask.
_ALIGNED_KEYS = {"align", "apply_method", "granularity"}

ConfigList = Sequence[Mapping[str, Any]]


def check_config_list(model: nn.Module, config_list: ConfigList) -> list[dict[str, Any]]:
    """Validate a config list, and return it in NNI 3.0's form.

    Parameters
    ----------
    model
        The unwrapped model.
    config_list
        NNI's config list, in the form of NNI 3.0 or the legacy form (``sparsity``, ``total_sparsity``,
        ``exclude``, ``op_partial_names``). As an extension, an entry or a target setting may have a
        ``sparse_pattern``, ``"N:M"``, which keeps N of every M consecutive weights along the input dimension.
        ``target_settings`` override the entry's own keys; None removes a key.

    Raises
    ------
    EmptyMatchError
        If the list, or an entry of it, selects no module.
    SparseRatioError
        If a sparse ratio is missing, not a number, outside [0, 1), or differs within a ``global_group_id`` or
        ``dependency_group_id``.
    TargetWithoutParametersError
        If a selected module, or a target to prune, has no parameter.
    WeightDtypeError
        If the weights of a target are not floating point, or have no values.
    WeightValueError
        If the weights of a target are NaN or infinite.
    ConfigListError
        If an entry is malformed, unsupported, or in conflict with another entry about a target. If legacy
        entries overlap, the later one applies instead.
    """
    if not isinstance(config_list, Sequence) or not all(isinstance(entry, Mapping) for entry in config_list):
        raise ConfigListError(f"a config list is a list of dicts, got {config_list!r}")
    entries = [dict(deepcopy(entry)) for entry in config_list]
    for entry in entries:
        _check_form(entry)
        _check_ratios(entry)
    group_ratios: dict[tuple[str, int | str], float] = {}
    checked = _to_current_form(entries)
    if not checked:
        raise EmptyMatchError("the config list selects nothing: it has no entry that prunes")
    selections = resolve(model, checked)
    for selection in selections:
        for name, module in selection.modules.items():
            check_initialized(name, module)
            for target, setting in _settings(name, module, selection.entry).items():
                _check_target(f"{name}.{target}", module, getattr(module, target, None), setting)
                _check_groups(f"{name}.{target}", setting, group_ratios)
    if left := unnamed_weights(model, selections):
        _logger.warning("%s", left)
    return [selection.by_names() for selection in selections]


def refuse_targets_taken(
    model: nn.Module, config_list: list[dict[str, Any]], wrappers: dict[str, ModuleWrapper]
) -> None:
    """Refuse targets that an earlier pruner of a chain prunes; NNI only warns and ignores the new setting.

    Raises
    ------
    ConfigListError
        If there is such a target.
    """
    for entry in config_list:
        modules, public, _ = select_modules_by_config(model, entry)
        for module_name in modules.keys() & wrappers.keys():
            taken = wrappers[module_name].pruning_target_spaces
            for name in canonicalize_settings(modules[module_name], public, "pruning").keys() & taken.keys():
                if is_active_target(taken[name]):
                    raise ConfigListError(
                        f"{module_name}.{name} is pruned by an earlier compressor of the chain: start from "
                        "its masks instead, LotteryJackpotPruner(model, config_list, init=masks)"
                    )


def _check_form(entry: dict[str, Any]) -> None:
    """Refuse entries that would break the later checks or NNI, or that NNI would silently ignore."""
    targets = entry.get("target_settings", {})
    if not isinstance(targets, dict) or not all(isinstance(setting, dict) for setting in targets.values()):
        raise ConfigListError(
            "target_settings must be a dict of dicts, such as {'weight': {'sparse_ratio': 0.5}}, "
            f"got {targets!r} in {entry}"
        )
    ratios = [key for key in (*_RATIO_KEYS, "sparse_threshold") if key in entry]
    if len(ratios) > 1 and entry.keys() & {*_LEGACY_RATIO_KEYS}:
        raise SparseRatioError(f"{' and '.join(ratios)} have the same meaning: write one of them in {entry}")
    for legacy in (key for key in _LEGACY_RATIO_KEYS if key in entry):
        lost = [key for key in ("sparse_pattern", *_LOST_WITH_LEGACY_KEYS) if key in entry]
        if lost:
            raise ConfigListError(
                f"{legacy} is a key of NNI's config list before 3.0, which has no {' or '.join(lost)}: "
                f"write sparse_ratio in {entry}"
            )


def _check_ratios(entry: dict[str, Any]) -> None:
    """Convert an entry's sparse ratios to floats in [0, 1), and move a pattern to the weight's settings."""
    if (pattern := entry.pop("sparse_pattern", None)) is not None:
        targets = entry.setdefault("target_settings", {})
        targets["weight"] = {"sparse_pattern": pattern, **targets.get("weight", {})}
    targets = entry.get("target_settings") or {}
    for setting in [entry, *targets.values()]:
        for key in _RATIO_KEYS:
            if (ratio := setting.get(key)) is None:
                continue
            if isinstance(ratio, bool) or not isinstance(ratio, int | float):
                raise SparseRatioError(f"{key} must be a number in [0, 1), got {ratio!r} in {entry}")
            if not 0 <= ratio < 1:
                hint = f"; for {ratio} percent write {ratio / 100}" if 1 < ratio < 100 else ""
                raise SparseRatioError(f"{key} must lie in [0, 1), got {ratio} in {entry}{hint}")
            setting[key] = float(ratio)
        _refuse_ratio_and_threshold(f"{entry}", setting)
        if (threshold := setting.get("sparse_threshold")) is not None:
            is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if not is_number or not math.isfinite(threshold):
                raise SparseRatioError(
                    f"sparse_threshold must be a finite number, got {threshold!r} in {entry}"
                )
            setting["sparse_threshold"] = float(threshold)
    for setting in targets.values():
        if "sparse_pattern" in setting:
            kept, of = parse_pattern(setting["sparse_pattern"])
            asked = setting.get("sparse_ratio", entry.get("sparse_ratio"))
            if asked is None:
                asked = setting["sparse_ratio"] = 1 - kept / of
            if not math.isclose(asked, 1 - kept / of):
                raise SparseRatioError(
                    f"sparse_pattern {kept}:{of} is a sparse_ratio of {1 - kept / of}, got {asked} in {entry}"
                )


def _refuse_ratio_and_threshold(where: str, setting: Mapping[str, Any]) -> None:
    ratio, threshold = setting.get("sparse_ratio"), setting.get("sparse_threshold")
    if ratio is not None and threshold is not None:
        raise SparseRatioError(
            f"{where} has a sparse_ratio of {ratio} and a sparse_threshold of {threshold}, which exclude "
            "each other: a target inherits both from its entry unless its target_settings set one to None"
        )


def _to_current_form(entries: list[dict[str, Any]]) -> list[Entry]:
    """Translate legacy entries; entries that only exclude are merged into the others."""
    found = [Entry(entry, deepcopy(entry), bool(_LEGACY_KEYS & entry.keys())) for entry in entries]
    if any(entry.is_legacy for entry in found):
        # NNI looks for legacy keys in the first entry only.
        found.sort(key=lambda entry: not entry.is_legacy)
        translated = trans_legacy_config_list([entry.entry for entry in found])
        for entry, now in zip(found, translated, strict=True):
            for key in (key for key in entry.original if key.startswith("exclude_op")):
                # The translation overwrites the entry's own exclusions.
                now[key] = sorted({*entry.original[key], *now.get(key, [])})
            entry.entry = now
        found = [entry for entry in found if not entry.original.get("exclude")]
    for entry in found:
        targets = entry.entry.get("target_settings", {})
        for setting in targets.values():
            # NNI translates ``total_sparsity`` to a key that NNI's schema refuses.
            if "group_id" in setting:
                setting["global_group_id"] = setting.pop("group_id")
        for prefix in _PREFIXES:
            # NNI requires settings for all outputs, even if the first output has settings.
            if (first := f"{prefix}0") in targets:
                targets.setdefault(prefix, targets[first])
        _check_by_schema(entry.entry)
    return found


def _check_by_schema(entry: dict[str, Any]) -> None:
    known = _known_to_nni({key: value for key, value in entry.items() if key != "target_settings"})
    targets = entry.get("target_settings", {}).items()
    # NNI's schema allows one ratio per entry, and would refuse a target's ratio next to the entry's: validate
    # each part alone.
    parts = [{"op_names": [], "target_settings": {name: _known_to_nni(s)}} for name, s in targets]
    for part in [known, *parts]:
        try:
            default_config_schema("pruning").validate(part)
        except SchemaError as error:
            raise ConfigListError(f"NNI does not accept the config list entry {entry}: {error}") from error


def _known_to_nni(setting: dict[str, Any]) -> dict[str, Any]:
    """Drop the keys that NNI's schema does not know, and None where it does not allow None."""
    return {
        key: value
        for key, value in setting.items()
        if key != "sparse_pattern" and (value is not None or key in SELECTING_KEYS)
    }


def _settings(name: str, module: nn.Module, entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return NNI's settings of the targets of a module that have a sparse ratio or threshold."""
    kind = type(module).__name__
    has_only_values = all(map(is_input_or_output, PruningSetting.registry.get(kind, ("weight",))))
    has_parameters = parametrize.is_parametrized(module) or any(
        True for _ in module.parameters(recurse=False)
    )
    if not has_only_values and not has_parameters:
        raise TargetWithoutParametersError(f"{name} ({kind}) has no parameter to prune; select other modules")
    if kind not in PruningSetting.registry:
        known = ", ".join(PruningSetting.registry)
        raise ConfigListError(
            f"NNI does not know how to prune {name} ({kind}); it knows {known}; "
            f"others are made known by nni.compression.base.setting.PruningSetting.register"
        )
    public = without_selection(entry)
    _check_target_names(name, module, entry)
    try:
        settings = canonicalize_settings(module, public, "pruning")
    except KeyError as error:
        raise ConfigListError(
            f"{name}: target_settings of {entry} must have {error}, for which NNI has no defaults"
        ) from error
    active = {
        target: s
        for target, s in settings.items()
        if s.get("sparse_ratio") is not None or s.get("sparse_threshold") is not None
    }
    aligned = False
    for target, setting in settings.items():
        usual = PruningSetting.registry[kind].get(target, {})
        requested = {key: v for key, v in setting.items() if v is not None and v != usual.get(key)}
        is_aligned = setting.get("align") is not None
        aligned |= is_aligned and has_align_of_its_own(public, target)
        if is_input_or_output(target):
            if target in active or not is_aligned:
                raise ConfigListError(
                    f"{name}.{target}: inputs and outputs hold no weights to search; "
                    "give it an align to a searched target"
                )
            scaling_of(f"{name}.{target}", module, target, setting)
        elif target in active:
            if is_aligned and has_align_of_its_own(public, target):
                raise ConfigListError(f"{name}.{target} has both an align and a sparse ratio: {entry}")
        elif requested.keys() - (_ALIGNED_KEYS if is_aligned else set()):
            # Without a ratio the target is not pruned, such as a bias, and the settings have no effect.
            if not active:
                raise SparseRatioError(f"{name}.{target} has {requested} but no sparse_ratio: {entry}")
            raise ConfigListError(f"{name}.{target}: {requested} is not supported without a sparse_ratio")
        elif is_aligned and (parameter := getattr(module, target)) is not None:
            if has_align_of_its_own(public, target):
                check_maskable(f"{name}.{target}", module, target)
            check_granularity(f"{name}.{target}", module, parameter, setting)
    if not active and not aligned:
        raise SparseRatioError(f"the config list entry {entry} gives {name} no sparse_ratio")
    return active


def _check_target_names(name: str, module: nn.Module, entry: dict[str, Any]) -> None:
    """Refuse unknown names of targets; NNI looks them up only on wrapping, or never."""
    names, targets = entry.get("target_names") or (), entry.get("target_settings", ())
    for target in [*names, *targets]:
        if not is_input_or_output(target) and not isinstance(getattr(module, target, ...), Tensor | None):
            raise ConfigListError(
                f"{name} ({type(module).__name__}) has no {target!r}, a target that {entry} names; it has "
                f"{', '.join(module._parameters)}, {INPUT_PREFIX} and {OUTPUT_PREFIX}"
            )
    named = {*names, *(n + "0" for n in names), *(p for p in _PREFIXES for n in names if n.startswith(p))}
    if names and (left_out := sorted(set(targets) - named)):
        raise ConfigListError(
            f"target_settings have {', '.join(left_out)}, which target_names leave out, in {entry}"
        )


def is_input_or_output(target: str) -> bool:
    """Return True if a target is an input or output of a module, not a parameter."""
    return target.startswith(_PREFIXES)


def has_align_of_its_own(entry: Mapping[str, Any], target: str) -> bool:
    """Return True if an entry sets ``align`` for a target, instead of NNI's default."""
    settings = entry.get("target_settings") or {}
    names = [target, *(prefix for prefix in _PREFIXES if target.startswith(prefix))]
    return "align" in entry or any("align" in settings.get(name, {}) for name in names)


def _check_target(name: str, module: nn.Module, parameter: Tensor | None, setting: dict[str, Any]) -> None:
    if parameter is None:
        raise TargetWithoutParametersError(f"{name} is None: there is no parameter to prune")
    check_maskable(name, module, name.rpartition(".")[2])
    _refuse_ratio_and_threshold(name, setting)
    blocks = setting.get("internal_metric_block")
    if blocks is not None and blocks < 1:
        raise ConfigListError(f"{name}: internal_metric_block must be at least 1, or None, got {blocks}")
    low, high = setting.get("min_sparse_ratio") or 0.0, setting.get("max_sparse_ratio")
    if high is not None and low > high:
        raise SparseRatioError(f"{name}: min_sparse_ratio {low} is above max_sparse_ratio {high}")
    if setting.get("apply_method") == "add":
        raise ConfigListError(
            f"{name}: apply_method='add' is not supported for weights, only for inputs and outputs; use 'mul'"
        )
    check_granularity(name, module, parameter, setting)
    if (pattern := setting.get("sparse_pattern")) is not None:
        _check_pattern(name, module, parameter, parse_pattern(pattern)[1], setting)


def _check_pattern(name: str, module: nn.Module, parameter: Tensor, of: int, setting: dict[str, Any]) -> None:
    if parameter.dim() < 2:
        raise ConfigListError(f"{name} has no input dimension: a sparse_pattern needs one")
    others = {"global_group_id", "dependency_group_id", "internal_metric_block", "sparse_threshold"}
    rivals = sorted(key for key in others | _BOUNDS if setting.get(key) is not None)
    if setting.get("granularity") not in (None, "default"):
        rivals.append("granularity")
    if rivals:
        raise ConfigListError(f"{name}: a sparse_pattern cannot be combined with {', '.join(rivals)}")
    inputs = parameter.shape[layout_of(module, name.rpartition(".")[2]).input_dim]
    if inputs % of:
        raise ConfigListError(
            f"{name}: its input dimension of {inputs} is not a multiple of {of}, as sparse_pattern "
            f"{setting['sparse_pattern']!r} needs; exclude it by exclude_op_names"
        )


def _check_groups(
    name: str, setting: dict[str, Any], group_ratios: dict[tuple[str, int | str], float]
) -> None:
    """Refuse different sparse ratios within a group."""
    for key in ("global_group_id", "dependency_group_id"):
        group = setting.get(key)
        if group is None or setting.get("sparse_ratio") is None:
            continue
        ratio = group_ratios.setdefault((key, group), setting["sparse_ratio"])
        if ratio != setting["sparse_ratio"]:
            raise SparseRatioError(
                f"{name} has sparse_ratio {setting['sparse_ratio']}, its {key} {group!r} has {ratio}"
            )
