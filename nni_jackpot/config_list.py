"""NNI's config list, checked against the model before anything is wrapped.

NNI reports a bad config list by an assertion deep inside, or not at all (an entry that matches nothing). Here
every entry is checked first, by NNI's own selectors, settings and schema, and what is wrong is said once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting, canonicalize_settings
from schema import SchemaError
from torch import Tensor, nn

from nni_jackpot.errors import (
    ConfigListError,
    EmptyMatchError,
    SparseRatioError,
    TargetWithoutParametersError,
    WeightDtypeError,
)

_LEGACY_KEYS = {"exclude", "sparsity", "sparsity_per_layer", "total_sparsity", "op_partial_names"}
_RATIO_KEYS = ("sparse_ratio", "sparsity", "sparsity_per_layer", "total_sparsity")
# What a scored target may ask for. Any other key that NNI accepts is an error rather than silently ignored.
_HONOURED = {"sparse_ratio", "global_group_id", "granularity", "apply_method"}

ConfigList = Sequence[Mapping[str, Any]]


def check_config_list(model: nn.Module, config_list: ConfigList) -> list[dict[str, Any]]:
    """Return the config list in NNI 3.0's form, every entry checked.

    Parameters
    ----------
    model
        The unwrapped model.
    config_list
        NNI's config list, in the form of NNI 3.0 or the legacy one (``sparsity``, ``total_sparsity``,
        ``exclude``, ``op_partial_names``).

    Raises
    ------
    EmptyMatchError
        If the list, or an entry of it, selects no module.
    SparseRatioError
        If a sparse ratio is missing, no number, outside [0, 1), or differs within a ``global_group_id``.
    TargetWithoutParametersError
        If a selected module, or a target that is to be pruned, holds no parameter.
    WeightDtypeError
        If the weights of a target are not floating point.
    ConfigListError
        If an entry is malformed or asks for something that is not supported.
    """
    if not isinstance(config_list, Sequence) or not all(isinstance(entry, Mapping) for entry in config_list):
        raise ConfigListError(f"a config list is a list of dicts, got {config_list!r}")
    entries = [dict(deepcopy(entry)) for entry in config_list]
    for entry in entries:
        _check_ratios(entry)
    group_ratios: dict[int | str, float] = {}
    checked = _to_current_form(entries)
    if not checked:
        raise EmptyMatchError("the config list selects nothing: it has no entry that prunes")
    for entry in checked:
        for name, module in _select(model, entry).items():
            for target, setting in _settings(name, module, entry).items():
                _check_target(f"{name}.{target}", getattr(module, target, None), setting)
                _check_group(f"{name}.{target}", setting, group_ratios)
    return checked


def _check_ratios(entry: dict[str, Any]) -> None:
    """Make every sparse ratio of an entry a float in [0, 1)."""
    settings = [entry, *(entry.get("target_settings") or {}).values()]
    for setting in settings:
        for key in _RATIO_KEYS:
            if key not in setting:
                continue
            ratio = setting[key]
            if isinstance(ratio, bool) or not isinstance(ratio, int | float):
                raise SparseRatioError(f"{key} must be a number in [0, 1), got {ratio!r} in {entry}")
            if not 0 <= ratio < 1:
                hint = f"; for {ratio} percent write {ratio / 100}" if 1 < ratio < 100 else ""
                raise SparseRatioError(f"{key} must lie in [0, 1), got {ratio} in {entry}{hint}")
            setting[key] = float(ratio)


def _to_current_form(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Translate legacy entries; those that only exclude go, once the others have their exclusions."""
    if any(_LEGACY_KEYS & entry.keys() for entry in entries):
        # NNI looks for legacy keys in the first entry only.
        entries = sorted(entries, key=lambda entry: not _LEGACY_KEYS & entry.keys())
        excluding = [bool(entry.get("exclude")) for entry in entries]
        kept_exclusions = [
            {key: entry[key] for key in entry if key.startswith("exclude_op")} for entry in entries
        ]
        entries = trans_legacy_config_list(entries)
        for entry, exclusions in zip(entries, kept_exclusions, strict=True):
            for key, names in exclusions.items():  # which the translation overwrites
                entry[key] = sorted({*names, *entry.get(key, [])})
        entries = [entry for entry, excludes in zip(entries, excluding, strict=True) if not excludes]
    schema = default_config_schema("pruning")
    for entry in entries:
        # NNI translates ``total_sparsity`` to a key that its own schema refuses.
        for setting in (entry.get("target_settings") or {}).values():
            if "group_id" in setting:
                setting["global_group_id"] = setting.pop("group_id")
        try:
            schema.validate(entry)
        except SchemaError as error:
            raise ConfigListError(f"NNI does not accept the config list entry {entry}: {error}") from error
    return entries


def _select(model: nn.Module, entry: dict[str, Any]) -> dict[str, nn.Module]:
    """Return the modules that an entry selects, which is at least one."""
    try:
        modules, _, _ = select_modules_by_config(model, entry)
    except KeyError as error:  # NNI looks every op name up
        raise EmptyMatchError(f"the model has no module {error}, which {entry} names") from None
    if not modules:
        types = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))})
        raise EmptyMatchError(
            f"the config list entry {entry} selects no module; "
            f"module types of this model that hold parameters: {', '.join(types)}"
        )
    return modules


def _settings(name: str, module: nn.Module, entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return NNI's setting of every target of a module that is to be pruned."""
    kind = type(module).__name__
    if not any(True for _ in module.parameters(recurse=False)):
        raise TargetWithoutParametersError(
            f"{name} ({kind}) holds no parameter to prune; select other modules"
        )
    if kind not in PruningSetting.registry:
        known = ", ".join(PruningSetting.registry)
        raise ConfigListError(
            f"NNI does not know how to prune {name} ({kind}); it knows {known}; "
            f"others are made known by nni.compression.base.setting.PruningSetting.register"
        )
    selectors = ("op_names", "op_types", "op_names_re")
    public = {key: v for key, v in entry.items() if key not in selectors and not key.startswith("exclude_op")}
    try:
        settings = canonicalize_settings(module, public, "pruning")
    except KeyError as error:
        raise ConfigListError(
            f"{name} ({kind}) has no pruning target {error} asked for by {entry}"
        ) from error
    for target in settings:
        if target.startswith((INPUT_PREFIX, OUTPUT_PREFIX)):
            raise ConfigListError(
                f"{name}.{target}: inputs and outputs hold no weights that could be searched"
            )
    active = {target: s for target, s in settings.items() if s.get("sparse_ratio") is not None}
    for target in [target for target in settings if target not in active]:
        # A target without a sparse ratio of its own, such as a bias, stays whole: it can have no other wish.
        usual = PruningSetting.registry[kind].get(target, {})
        wishes = {key: v for key, v in settings[target].items() if v is not None and v != usual.get(key)}
        if wishes and not active:
            raise SparseRatioError(f"{name}.{target} has {wishes} but no sparse_ratio: {entry}")
        if wishes:
            raise ConfigListError(f"{name}.{target}: {wishes} is not supported without a sparse_ratio")
    if not active:
        raise SparseRatioError(f"the config list entry {entry} gives {name} no sparse_ratio")
    return active


def _check_target(name: str, parameter: Tensor | None, setting: dict[str, Any]) -> None:
    if parameter is None:
        raise TargetWithoutParametersError(f"{name} is None: there is no parameter to prune")
    if not parameter.is_floating_point():
        raise WeightDtypeError(f"{name} is {parameter.dtype}: scores need floating-point weights")
    for key, value in setting.items():
        if value is not None and key not in _HONOURED:
            raise ConfigListError(f"{name}: {key}={value!r} is not supported")
    if setting.get("granularity") not in (None, "default"):
        raise ConfigListError(
            f"{name}: granularity={setting['granularity']!r} is not supported; "
            "'default' searches single weights (fine-grained)"
        )
    if setting.get("apply_method") not in (None, "mul"):
        raise ConfigListError(f"{name}: apply_method={setting['apply_method']!r} is not supported; use 'mul'")


def _check_group(name: str, setting: dict[str, Any], group_ratios: dict[int | str, float]) -> None:
    """Every member of a global group must have the group's sparse ratio."""
    group = setting.get("global_group_id")
    if group is None:
        return
    ratio = group_ratios.setdefault(group, setting["sparse_ratio"])
    if ratio != setting["sparse_ratio"]:
        raise SparseRatioError(
            f"{name} has sparse_ratio {setting['sparse_ratio']}, its global_group_id {group!r} has {ratio}"
        )
