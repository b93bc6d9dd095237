"""Plain data is read strictly into frozen dataclasses, which are the schema.

A field's type, rule and doc are all that reading, overriding and error messages go by.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from nni_jackpot.errors import ExperimentConfigError


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must fulfil, in words and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Rule:
    """Return the rule for numbers from ``low`` to ``high``."""
    return Rule(f">= {low:,} and <= {high:,}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    """Return the rule for a choice."""
    return Rule("out of " + ", ".join(choices), lambda value: value in choices)


ANY = Rule("", lambda value: True)


def option(doc: str, rule: Rule = ANY, default: Any = MISSING) -> Any:
    """Return a field of a schema, which has to be given where there is no default."""
    return field(default=default, metadata={"doc": doc, "rule": rule})


class Invalid(ExperimentConfigError):
    """A finding about one key, before the file is known."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key or 'the top level'}: {text}")
        self.key = key
        self.text = text


def read_section(cls: Any, raw: object, key: str) -> Any:
    """Read a mapping as the dataclass ``cls``."""
    if not isinstance(raw, dict):
        raise Invalid(key, f"found {shown(raw)}, allowed: {_allowed(cls, ANY)}")
    kinds = get_type_hints(cls)
    for name in raw:
        if name not in kinds:
            raise Invalid(_join(key, name), _unknown(name, kinds))
    values = {}
    for entry in dataclasses.fields(cls):
        name, kind, rule = entry.name, kinds[entry.name], entry.metadata.get("rule", ANY)
        if name in raw:
            values[name] = _read_value(kind, rule, raw[name], _join(key, name))
        elif entry.default is MISSING:
            wanted = f"{_allowed(kind, rule)} ({entry.metadata.get('doc', kind.__doc__)})"
            raise Invalid(_join(key, name), f"is missing, allowed: {wanted}")
    try:
        return cls(**values)
    except Invalid as error:
        raise Invalid(_join(key, error.key), error.text) from None


def _read_value(kind: Any, rule: Rule, raw: Any, key: str) -> Any:
    if raw is None and NoneType in get_args(kind):
        return None
    base = _without_none(kind)
    if dataclasses.is_dataclass(base):
        return read_section(base, raw, key)
    if get_origin(base) is tuple and isinstance(raw, list) and rule.holds(raw):
        return tuple(_read_entry(entry, _join(key, i)) for i, entry in enumerate(raw))
    fits = type(raw) is base  # not isinstance: true and false are no integers here
    if base is float:
        # The comparison is false for nan, and safe for integers beyond all floats.
        fits = type(raw) in (int, float) and abs(raw) <= sys.float_info.max
    if not fits or not rule.holds(raw):
        raise Invalid(key, f"found {shown(raw)}, allowed: {_allowed(kind, rule)}")
    return base(raw)


def _read_entry(raw: object, key: str) -> dict[str, Any]:
    """Copy an entry of NNI's config list, whose keys are NNI's to judge."""
    try:
        # Equal only if all keys are strings; fails for dates, nan, and aliases to themselves.
        entry = json.loads(json.dumps(raw, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        entry = None
    if not isinstance(raw, dict) or not raw or entry != raw:
        wanted = "a mapping that is not empty, with string keys and plain values"
        raise Invalid(key, f"found {shown(raw)}, allowed: {wanted}")
    return entry


def overridden(node: Any, kind: Any, parts: list[str], value: object, name: str) -> Any:
    """Return ``node`` with the value at ``parts`` replaced, in a copy, for YAML aliases share nodes."""
    if not parts:
        value = value.item() if isinstance(value, np.generic) else value
        return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value
    part, *rest = parts
    child: Any = None  # inside NNI's entries there is no schema
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        if part not in kinds:
            raise Invalid(name, f"this override is about an {_unknown(part, kinds)}")
        child = kinds[part]
    if isinstance(node, list):
        if part not in map(str, range(len(node))):
            wanted = f"allowed: 0 to {len(node) - 1}"
            raise Invalid(name, f"this override is about entry {part!r} of {len(node)}, {wanted}")
        at = int(part)
        return [*node[:at], overridden(node[at], child, rest, value, name), *node[at + 1 :]]
    if not isinstance(node, dict):
        raise Invalid(name, f"this override looks for {part!r} in {shown(node)}, which has no keys")
    return {**node, part: overridden(node.get(part, {}), child, rest, value, name)}


def related(a: str, b: str) -> bool:
    """Tell whether one dotted name is the other or a parent of it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _without_none(kind: Any) -> Any:
    return next((arg for arg in get_args(kind) if NoneType in get_args(kind) and arg is not NoneType), kind)


def shown(raw: object) -> str:
    """Return a value as messages show it, with its type."""
    try:
        text = repr(raw)
    except ValueError:  # an integer of more digits than Python writes
        text = "what is too large to be shown"
    return f"{text if len(text) <= 100 else text[:97] + '...'} ({type(raw).__name__})"


def _allowed(kind: Any, rule: Rule) -> str:
    base = _without_none(kind)
    if dataclasses.is_dataclass(base):
        return f"a mapping with keys out of {', '.join(get_type_hints(base))}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return ("null or " if base is not kind else "") + f"{names.get(base, 'a list')} {rule.allowed}".strip()


def _unknown(name: object, names: Iterable[str]) -> str:
    return f"unknown key {name!r}, allowed: {', '.join(names)}{close_match(str(name), names)}"


def close_match(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the close one that may have been meant, if any."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""
