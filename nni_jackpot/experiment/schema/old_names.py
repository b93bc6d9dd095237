"""Old names of settings, which work for one release; the only place that knows them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

# New name of a key of the section `search`, and new values by old values.
_RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "growth": ("ramp_end", {}),
    "hardening": ("anneal_end", {}),
    "adapt_norm": ("norm", {True: "adapt", False: "freeze"}),
    "recipe": ("recipe", {"jackpot": "default"}),
}
# Settings of edge-popup that every finished run used to list, with the values that supermasks left alone.
_UNUSED = {"growth": None, "temperature": None, "hardening": None, "kept_score": 1.0, "pruned_score": 0.95}
_UNUSED |= {"swap_limit": None}


def renamed(raw: Any, said: list[str]) -> Any:
    """Return the content of a YAML file with new names for old ones; add each change in words to ``said``."""
    if not isinstance(raw, dict) or not isinstance(raw.get("search"), dict):
        return raw
    search = raw["search"]
    if search.get("method") == "supermask" and "growth" in search:  # of a finished run
        search = {name: v for name, v in search.items() if name not in _UNUSED or v != _UNUSED[name]}
    return {**raw, "search": dict(_renamed(name, value, said) for name, value in search.items())}


def renamed_overrides(overrides: Mapping[str, object], said: list[str]) -> dict[str, object]:
    """Return overrides by dotted name with new names for old ones; arguments as for `renamed`."""
    found: dict[str, object] = {}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if section == "search" and key:
            key, value = _renamed(key, value, said)
            name = f"search.{key}"
        elif name == "search":
            value = renamed({"search": value}, said)["search"]
        found[name] = value
    return found


def _renamed(name: Any, value: Any, said: list[str]) -> tuple[Any, Any]:
    value = value.item() if isinstance(value, np.generic) else value
    new, values = _RENAMED.get(name, (name, {})) if isinstance(name, str) else (name, {})
    found = values.get(value, value) if isinstance(value, bool | str) else value
    if (new, found) != (name, value):
        said.append(f"search.{name}" + (f": {value}" if found != value else ""))
        said[-1] += f" is now search.{new}" + (f": {found}" if found != value else "")
    return new, found


@cache
def warn(path: str, said: tuple[str, ...]) -> None:
    """Log one warning about old names; the same warning is logged once in a process."""
    text = "%s: old names work until the next release: %s"
    logging.getLogger(__name__).warning(text, path, ", ".join(dict.fromkeys(said)))
