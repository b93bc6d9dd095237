"""The registry of presets: config lists that a function makes for a network, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nni_jackpot.errors import ConfigListError
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.registry import Registry

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class Preset:
    """A kind of sparsity.

    Attributes
    ----------
    entries
        Returns the config list for a network and a sparsity, the share of zeros (of channels: of channels).
    doc
        What is pruned, in a line.
    sparsity
        The only possible sparsity; None if any is.
    search
        Settings of the section ``search`` that suit, where the file does not say others.
    """

    entries: Callable[[nn.Module, float], Entries]
    doc: str
    sparsity: float | None = None
    search: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Registry[Preset] = Registry("preset", names=r"[\w:]+")


def register_preset(
    name: str, *, sparsity: float | None = None, **search: Any
) -> Callable[[Callable[[nn.Module, float], Entries]], Callable[[nn.Module, float], Entries]]:
    """Return a decorator that registers a function as a preset.

    Parameters
    ----------
    name
        The name, for ``preset`` in a run's file.
    sparsity
        The only possible sparsity; None if any is.
    **search
        Settings of the section ``search`` that suit the preset.

    Raises
    ------
    ValueError
        If the name has other characters than letters, digits, ``_`` and ``:``, or belongs to another preset.
    """

    def decorate(entries: Callable[[nn.Module, float], Entries]) -> Callable[[nn.Module, float], Entries]:
        doc = (entries.__doc__ or "").strip().splitlines()[0]
        PRESETS.register(name, source=entries)(Preset(entries, doc, sparsity, search))
        return entries

    return decorate


def entries_of(name: str, model: nn.Module, sparsity: float | None) -> Entries:
    """Return the config list of a preset for a network.

    Raises
    ------
    ConfigListError
        If the network has nothing that the preset can prune.
    """
    preset = PRESETS.find(name)
    ratio = preset.sparsity if sparsity is None else sparsity
    assert ratio is not None  # the config has checked it
    found = preset.entries(model, ratio)
    if not found:
        raise ConfigListError(
            f"preset: {name} finds nothing to prune in this network ({preset.doc}); take another preset, or "
            "write a config_list"
        )
    return found


def check_preset(name: str | None, sparsity: float | None, has_list: bool) -> None:
    """Check that a run has one source of what to prune, and how much; raises Invalid."""
    if name is None:
        if not has_list:
            wanted = "a list that is not empty (what to prune, and how much), or a preset"
            raise Invalid("config_list", f"is missing, allowed: {wanted}")
        if sparsity is not None:
            raise Invalid("sparsity", f"found {sparsity}, allowed: null without a preset")
        return
    if has_list:
        raise Invalid("config_list", f"found a list, allowed: none beside preset, which is {name}")
    if name not in PRESETS:  # of a finished run whose plugin is not imported
        return
    fixed = PRESETS[name].sparsity
    if fixed is None and sparsity is None:
        raise Invalid("sparsity", f"is missing, allowed beside preset {name}: a number > 0 and < 1")
    if fixed is not None and sparsity not in (None, fixed):
        raise Invalid("sparsity", f"found {sparsity}, allowed: {fixed} or null for preset {name}")


def with_preset(raw: Any) -> Any:
    """Return the content of a run's file with the settings of its preset, where it has no others."""
    name = raw.get("preset") if isinstance(raw, dict) else None
    if name is None:
        return raw
    rest = {key: value for key, value in raw.items() if (key, value) != ("config_list", [])}
    if isinstance(name, str) and name in PRESETS and isinstance(raw.get("search"), dict):
        rest["search"] = {**PRESETS[name].search, **raw["search"]}
    return rest
