"""Settings as dataclass fields: one place for the type, the range, the default and the help text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, field
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from nni_jackpot.runtime.registry import Registry


class SettingError(ValueError):
    """A setting is out of range, or conflicts with other settings.

    Parameters
    ----------
    key
        Name of the setting.
    text
        The value found, and the values allowed.
    """

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key = key
        self.text = text


class Rule:
    """A condition on values of the right type.

    Parameters
    ----------
    allowed
        The condition in words, such as ``">= 0"``; a function if the words can change.
    holds
        The condition as a predicate.
    is_open
        Whether code outside the package can allow more values, by registering them.
    """

    def __init__(
        self, allowed: str | Callable[[], str], holds: Callable[[Any], bool], is_open: bool = False
    ) -> None:
        self._allowed = allowed
        self.holds = holds
        self.is_open = is_open

    @property
    def allowed(self) -> str:
        """The condition in words."""
        return self._allowed if isinstance(self._allowed, str) else self._allowed()


def between(low: float, high: float) -> Rule:
    """Return the rule for numbers from ``low`` to ``high``."""
    return Rule(f">= {low:,} and <= {high:,}", lambda value: low <= value <= high)


def one_of(choices: Iterable[str]) -> Rule:
    """Return the rule for a choice; names that a registry gets later are allowed too."""
    return Rule(
        lambda: "out of " + ", ".join(choices), lambda value: value in choices, isinstance(choices, Registry)
    )


ANY = Rule("", lambda value: True)
# NumPy takes no larger seeds.
SEED = Rule(">= 0 and < 2**32", lambda value: 0 <= value < 2**32)


Affects = Literal["weights", "accuracy", "nothing"]


def option(doc: str, rule: Rule = ANY, default: Any = MISSING, *, affects: Affects = "weights") -> Any:
    """Return a dataclass field with its help text and rule; required if it has no default.

    Parameters
    ----------
    doc, rule, default
        Help text, condition and default of the setting.
    affects
        What another value may change: ``"weights"`` or masks, and all that follows from them; the measured
        ``"accuracy"`` alone; or ``"nothing"`` that is a result, such as the number of worker processes. Two
        runs are the same if they differ only in settings that affect nothing.
    """
    return field(default=default, metadata={"doc": doc, "rule": rule, "affects": affects})


def validate(settings: Any) -> None:
    """Check the type and the rule of every field of a settings dataclass, which gets plain numbers.

    Integers count as floats, and NumPy's numbers as Python's.

    Raises
    ------
    SettingError
        For the first field with an invalid value.
    """
    kinds = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        if "rule" not in entry.metadata:
            continue
        kind, value = without_none(kinds[entry.name]), getattr(settings, entry.name)
        if isinstance(value, np.generic):
            value = value.item()
        check(entry.name, kinds[entry.name], entry.metadata["rule"], value)
        if value is not None and kind in (bool, int, float, str):
            object.__setattr__(settings, entry.name, kind(value))


def check(name: str, kind: Any, rule: Rule, value: Any) -> None:
    """Check the type and the rule of one value; raises SettingError."""
    if not fits(kind, rule, value):
        raise SettingError(name, f"found {shown(value)}, allowed: {allowed(kind, rule)}")


def fits(kind: Any, rule: Rule, value: Any) -> bool:
    """Return True if a value has the type and satisfies the rule."""
    if value is None and NoneType in get_args(kind):
        return True
    base = without_none(kind)
    is_fit = type(value) is base  # not isinstance: a bool does not count as an integer
    if base is float:
        # False for NaN; safe for integers beyond the range of floats.
        is_fit = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return is_fit and rule.holds(value)


def allowed(kind: Any, rule: Rule) -> str:
    """Describe in words the values that a type and a rule allow."""
    base = without_none(kind)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return ("null or " if base is not kind else "") + f"{names.get(base, 'a list')} {rule.allowed}".strip()


def without_none(kind: Any) -> Any:
    """Return the type within an optional type."""
    return next((arg for arg in get_args(kind) if NoneType in get_args(kind) and arg is not NoneType), kind)


def shown(value: object) -> str:
    """Return a value as error messages show it, with its type."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        text = "a number too large to show"
    return f"{text if len(text) <= 100 else text[:97] + '...'} ({type(value).__name__})"
