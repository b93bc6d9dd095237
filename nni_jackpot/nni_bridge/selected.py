"""Selection of modules by config list entries, such that one entry decides about each target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import PruningSetting, canonicalize_settings
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from nni_jackpot.errors import ConfigListError, EmptyMatchError, first_few
from nni_jackpot.modules.layouts import is_conv1d, layout_of, matrices_of
from nni_jackpot.modules.parameters import first_names

SELECTING_KEYS = {
    *("op_types", "op_names", "op_names_re", "target_names"),
    *("exclude_op_types", "exclude_op_names", "exclude_op_names_re"),
}
_MODULE_KEYS = SELECTING_KEYS - {"target_names"}
_KNOWN_TO_NNI = frozenset(PruningSetting.registry)
_SHARE_WORTH_SAYING = 0.01


@dataclass
class Entry:
    """An entry of a config list, in NNI 3.0's form."""

    entry: dict[str, Any]
    original: Mapping[str, Any]
    """The entry as written by the user."""
    is_legacy: bool
    """Whether the original has the form before NNI 3.0."""


@dataclass
class Selection:
    """The modules that an entry selects, by their first names, in model order."""

    entry: dict[str, Any]
    modules: dict[str, nn.Module]

    def by_names(self) -> dict[str, Any]:
        """Return the entry with its modules selected by name only."""
        return {"op_names": list(self.modules), **without_selection(self.entry)}


def without_selection(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry without the keys that select modules."""
    return {key: value for key, value in entry.items() if key not in _MODULE_KEYS}


def resolve(model: nn.Module, entries: Sequence[Entry]) -> list[Selection]:
    """Find the modules of every entry, such that no target is selected by two entries.

    A module with several names is selected under its first name. If legacy entries overlap, the later entry
    applies, as NNI documents; an entry without remaining modules is dropped.

    Raises
    ------
    EmptyMatchError
        If an entry selects no module.
    ConfigListError
        If two entries of NNI 3.0's form have different settings for one target.
    """
    know_layers(model)
    first = first_names(model)
    found: list[tuple[Entry, Selection]] = []
    for entry in entries:
        selected = set(_select(model, entry).values())
        modules = {name: module for module, name in first.items() if module in selected}
        for earlier, selection in found:
            for name in modules.keys() & selection.modules.keys():
                if entry.is_legacy and earlier.is_legacy:
                    del selection.modules[name]
                else:
                    _refuse_conflict(name, modules[name], earlier, entry)
        found.append((entry, Selection(entry.entry, modules)))
    return [part for _, selection in found if selection.modules for part in _by_weights(selection)]


def know_layers(model: nn.Module) -> None:
    """Make types of layers known to NNI that it does not know: their weights, and biases that follow them."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in PruningSetting.registry:
            continue
        if is_conv1d(module) or (
            isinstance(module, nn.Linear) and type(module).__module__.startswith("torch.")
        ):
            PruningSetting.register(kind, PruningSetting.default_setting)
        elif names := matrices_of(module):
            weight, bias = (PruningSetting.default_setting[name] for name in ("weight", "bias"))
            setting: dict[str, Any] = dict.fromkeys(names, weight)
            for name in names:
                layout = layout_of(module, name)
                dims = [0] if layout.experts_dim is None else [layout.experts_dim, layout.output_dim]
                of_name = {"module_name": None, "target_name": name, "dims": dims}
                for bias_name in (f"{name}_bias", name.replace("weight", "bias")):
                    if bias_name in module._parameters and bias_name != name:
                        setting[bias_name] = {**bias, "align": of_name}
            PruningSetting.register(kind, setting)


def unnamed_weights(model: nn.Module, selections: Sequence[Selection]) -> str:
    """Describe the weights that a config list by types leaves whole, since it does not name their types.

    Layers that NNI knows may be left out on purpose. What this looks for is easily overlooked: parameters of
    attention, of fused experts, of layers that a library has written itself.

    Returns
    -------
    str
        Share, types, names and remedy; empty if no type has 1 % of the weights, or entries select by name.
    """
    if not any(selection.entry.get("op_types") for selection in selections):
        return ""
    spoken_of = {name for selection in selections for name in selection.modules}
    excluded: set[str] = set()
    for selection in selections:
        excluded.update(selection.entry.get("exclude_op_types") or ())
        excluded.update(selection.entry.get("exclude_op_names") or ())
    found: dict[str, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        prefix = name.rpartition(".")[0]
        module = model.get_submodule(prefix)
        kind = type(module).__name__
        is_plain = kind in _KNOWN_TO_NNI or parametrize.is_parametrized(module) or "parametrizations" in name
        if parameter.dim() > 1 and not is_plain and prefix not in spoken_of and not excluded & {kind, prefix}:
            found[kind].append(name)
    total, of_all, texts = sum(parameter.numel() for parameter in parameters.values()), 0, []
    for kind, names in found.items():
        count = sum(parameters[name].numel() for name in names)
        if count >= _SHARE_WORTH_SAYING * total:
            of_all += count
            how = "name it by op_types" if kind in PruningSetting.registry else "NNI does not know it"
            texts.append(f"{kind}, {first_few(names, separator=', ')}: {how}")
    if not texts:
        return ""
    return (
        f"{of_all / total:.0%} of all weights stay whole, in types that the config list does not name "
        f"({'; '.join(texts)}); exclude_op_types leaves them whole without this warning"
    )


def _by_weights(selection: Selection) -> list[Selection]:
    """Split a selection by the names of the modules' weights, which settings of ``weight`` then are for."""
    parts: dict[tuple[str, ...], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in selection.modules.items():
        parts[matrices_of(module)][name] = module
    return [
        Selection(_renamed(selection.entry, names) if names else selection.entry, modules)
        for names, modules in parts.items()
    ]


def _renamed(entry: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an entry whose settings of ``weight`` are for other parameters."""
    entry = dict(entry)
    if "weight" in (settings := dict(entry.get("target_settings") or {})):
        shared = settings.pop("weight")
        entry["target_settings"] = {**{name: dict(shared) for name in names}, **settings}
    if "weight" in (targets := entry.get("target_names") or ()):
        entry["target_names"] = [*names, *(target for target in targets if target != "weight")]
    return entry


def _select(model: nn.Module, entry: Entry) -> dict[str, nn.Module]:
    """Return the modules that an entry selects by NNI's rules, at least one."""
    try:
        modules, _, _ = select_modules_by_config(model, _with_other_forms_of_types(model, entry.entry))
    except KeyError as error:  # NNI looks up every op name
        raise EmptyMatchError(f"the model has no module {error}, which {entry.original} names") from None
    if not modules:
        types = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))})
        raise EmptyMatchError(
            f"the config list entry {entry.original} selects no module; "
            f"module types with parameters in this model: {', '.join(types)}"
        )
    return modules


def _with_other_forms_of_types(model: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
    """Let a type also select its variants, PyTorch's ParametrizedConv2d and LazyConv2d."""
    forms: dict[str, set[str]] = defaultdict(set)
    for module in model.modules():
        kind = type(module).__name__
        if parametrize.is_parametrized(module):
            plain = parametrize.type_before_parametrizations(module).__name__
        elif isinstance(module, LazyModuleMixin) and module.cls_to_become is not None:
            plain = module.cls_to_become.__name__
        else:
            continue
        forms[plain].add(kind)
        if plain in PruningSetting.registry and kind not in PruningSetting.registry:
            PruningSetting.register(kind, PruningSetting.registry[plain])
    types = {
        key: [*entry[key], *(form for kind in entry[key] for form in sorted(forms[kind]))]
        for key in ("op_types", "exclude_op_types")
        if entry.get(key)
    }
    return {**entry, **types}


def _refuse_conflict(name: str, module: nn.Module, earlier: Entry, later: Entry) -> None:
    """Refuse two entries with different settings for one target; NNI silently ignores the later one."""
    try:
        settings = [
            canonicalize_settings(module, without_selection(e.entry), "pruning") for e in (earlier, later)
        ]
    except (AssertionError, KeyError):  # an invalid entry, which other checks report
        return
    for target in settings[0].keys() & settings[1].keys():
        if settings[0][target] != settings[1][target]:
            raise ConfigListError(
                f"{name}.{target} is selected by two entries with different settings, {earlier.original} "
                f"and {later.original}: exclude {name} from one of them by exclude_op_names"
            )
