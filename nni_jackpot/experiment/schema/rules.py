"""Read plain data strictly into frozen dataclasses, which are the schema.

The type, rule and help text of a field (`nni_jackpot.runtime.settings`) are the only source for reading,
error messages and the reference page.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.runtime.registry import Registry, close_match
from nni_jackpot.runtime.settings import ANY, Rule, SettingError, allowed, fits, shown, without_none


class Invalid(ExperimentConfigError, SettingError):
    """An error in one key, raised before the name of the file is known."""

    def __init__(self, key: str, text: str) -> None:
        ExperimentConfigError.__init__(self, f"{key or 'the top level'}: {text}")
        self.key = key
        self.text = text


def _can_be_a_path(value: str) -> bool:
    try:
        return len(value) > 0 and b"\0" not in os.fsencode(value)
    except UnicodeError:
        return False


PATH = Rule("that is not empty, and can be a path", _can_be_a_path)
"""The rule for paths, in which the reader replaces ``~`` by the home folder."""


def inlined(base: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return a field that is a settings dataclass whose keys stand in the section itself.

    Parameters
    ----------
    base
        Returns the dataclass with the values of omitted keys, from the other values of the section.
    """
    return field(default=None, metadata={"base": base})


def by_name(doc: str, registry: Registry[Any]) -> Any:
    """Return a field that maps names of a registry of settings dataclasses to their sections."""
    return field(default_factory=dict, metadata={"doc": doc, "registry": registry})


@dataclass(frozen=True)
class Reader:
    """Read mappings as dataclasses.

    Attributes
    ----------
    loose
        Keys, by dotted name, that accept an integral float for an integer: NNI's tuners return such numbers.
    is_stored
        Whether the settings belong to a finished run, whose plugins need not be imported: names that are not
        registered, and their settings, are then accepted.
    """

    loose: Collection[str] = ()
    is_stored: bool = False

    def section(self, cls: Any, raw: object, key: str = "") -> Any:
        """Read a mapping as the dataclass ``cls``; raises `Invalid`."""
        if not isinstance(raw, dict):
            raise Invalid(key, f"found {shown(raw)}, allowed: {allowed_text(cls, ANY)}")
        if hasattr(cls, "choose"):  # the keys depend on a value of the section
            cls = cls.choose(raw)
        kinds = get_type_hints(cls)
        entries = {entry.name: entry for entry in dataclasses.fields(cls)}
        values = {
            name: self._value(kinds[name], entries[name].metadata, raw[name], _join(key, name))
            for name in raw
            if name in entries and "base" not in entries[name].metadata
        }
        rest = {name: value for name, value in raw.items() if name not in values}
        with _within(key):
            bases = {
                n: entry.metadata["base"](values) for n, entry in entries.items() if "base" in entry.metadata
            }
        names = [own for name in entries for own in (_names(bases[name]) if name in bases else [name])]
        is_known = not any(base is None for base in bases.values())
        if unknown := [name for name in rest if is_known and name not in names]:
            if not (self.is_stored and bases):
                raise Invalid(_join(key, unknown[0]), _unknown(unknown[0], names))
            bases = dict.fromkeys(bases)  # of another version of a plugin
        for name, base in bases.items():
            values[name] = self._inner(base, rest, key)
        for name, entry in entries.items():
            if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
                doc = entry.metadata.get("doc", kinds[name].__doc__)
                wanted = f"{allowed_text(kinds[name], entry.metadata.get('rule', ANY))} ({doc})"
                raise Invalid(_join(key, name), f"is missing, allowed: {wanted}")
        with _within(key):
            return cls(**values)

    def _inner(self, base: Any, raw: Mapping[str, Any], key: str) -> Any:
        """Return the settings of an inlined field; null stands for the value of ``base``."""
        if base is None:  # not registered
            return dict(raw)
        kinds = get_type_hints(type(base))
        values = {}
        for entry in dataclasses.fields(base):
            if (name := entry.name) not in raw:
                continue
            found = self._value(kinds[name] | None, entry.metadata, raw[name], _join(key, name))
            if found is not None or NoneType in get_args(kinds[name]):
                values[name] = found
        with _within(key):
            return dataclasses.replace(base, **values)

    def _value(self, kind: Any, metadata: Mapping[str, Any], raw: Any, key: str) -> Any:
        rule = metadata.get("rule", ANY)
        if raw is None and NoneType in get_args(kind):
            return None
        base = without_none(kind)
        if "registry" in metadata:
            return self._sections(metadata["registry"], raw, key)
        if dataclasses.is_dataclass(base):
            return self.section(base, raw, key)
        if get_origin(base) is tuple and isinstance(raw, list) and rule.holds(raw):
            if (part := get_args(base)[0]) in (str, float):
                return tuple(map(part, raw))
            return tuple(_entry(entry, _join(key, i)) for i, entry in enumerate(raw))
        if base is int and key in self.loose and isinstance(raw, float) and raw.is_integer():
            raw = int(raw)
        is_named = self.is_stored and rule.is_open and isinstance(raw, str)
        if not is_named and not fits(kind, rule, raw):
            raise Invalid(key, f"found {shown(raw)}, allowed: {allowed_text(kind, rule)}")
        return _expanded(key, raw) if rule is PATH else base(raw)

    def _sections(self, registry: Registry[Any], raw: object, key: str) -> dict[str, Any]:
        if not isinstance(raw, dict):
            wanted = f"a mapping with keys out of {', '.join(registry)}"
            raise Invalid(key, f"found {shown(raw)}, allowed: {wanted}")
        sections = {}
        for name, own in raw.items():
            try:
                if name not in registry:
                    raise Invalid(_join(key, name), _unknown(name, registry))
                sections[name] = self.section(registry.find(name), own, _join(key, name))
            except Invalid:
                if not self.is_stored or not isinstance(own, dict):
                    raise
                sections[name] = own  # of a plugin that is not imported, or of another version
        return sections


@contextmanager
def _within(key: str) -> Iterator[None]:
    """Put the name of a section before the keys that errors name."""
    try:
        yield
    except SettingError as error:
        raise Invalid(_join(key, error.key), error.text) from None


def _names(settings: Any) -> list[str]:
    return [] if settings is None else [entry.name for entry in dataclasses.fields(settings)]


def _entry(raw: object, key: str) -> dict[str, Any]:
    """Copy an entry of NNI's config list, whose keys NNI validates."""
    try:
        # Equal only if all keys are strings; fails for dates, nan, and aliases to themselves.
        entry = json.loads(json.dumps(raw, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        entry = None
    if not isinstance(raw, dict) or not raw or entry != raw:
        wanted = "a mapping that is not empty, with string keys and plain values"
        raise Invalid(key, f"found {shown(raw)}, allowed: {wanted}")
    return entry


def _expanded(key: str, path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise Invalid(
            key, f"found {path!r}, which is not the home folder of a user; a file of that name is ./{path}"
        )
    return expanded


def overridden(node: Any, parts: list[str], value: object, name: str) -> Any:
    """Return a copy of ``node`` with the value at ``parts`` replaced; YAML aliases share nodes."""
    if not parts:
        return value.item() if isinstance(value, np.generic) else value
    part, *rest = parts
    if isinstance(node, list):
        if part not in map(str, range(len(node))):
            wanted = f"allowed: 0 to {len(node) - 1}"
            raise Invalid(name, f"this override is about entry {part!r} of {len(node)}, {wanted}")
        at = int(part)
        return [*node[:at], overridden(node[at], rest, value, name), *node[at + 1 :]]
    if not isinstance(node, dict):
        raise Invalid(name, f"this override looks for {part!r} in {shown(node)}, which has no keys")
    return {**node, part: overridden(node.get(part, {}), rest, value, name)}


def related(a: str, b: str) -> bool:
    """Return True if one dotted name is the other or a parent of it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def allowed_text(kind: Any, rule: Rule) -> str:
    """Return in words what a type and a rule allow; a section by its keys."""
    base = without_none(kind)
    if dataclasses.is_dataclass(base):
        own = ", ".join(entry.name for entry in dataclasses.fields(base) if "base" not in entry.metadata)
        return f"a mapping with keys out of {own}"
    return allowed(kind, rule)


def _unknown(name: object, names: Iterable[str]) -> str:
    return f"unknown key {name!r}, allowed: {', '.join(names)}{close_match(name, names)}"
