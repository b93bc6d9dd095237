"""Registries: algorithms by name, open to code outside the package."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")
F = TypeVar("F")


class Registry(Mapping[str, T]):
    """Named objects of one kind, such as criteria or budgets.

    Parameters
    ----------
    kind
        Kind of the objects, for error messages: ``"criterion"``.
    names
        Pattern that every name matches; None for identifiers.

    Examples
    --------
    >>> BUDGETS = Registry[Rule]("budget")
    >>> @BUDGETS.register("half")
    ... def half(units, importance): ...
    """

    def __init__(self, kind: str, names: str | None = None) -> None:
        self.kind = kind
        self._names = names
        self._objects: dict[str, T] = {}
        self._origins: dict[str, object] = {}

    def register(self, name: str, /, source: object = None, **attributes: object) -> Callable[[F], F]:
        """Return a decorator that registers an object under a name.

        Parameters
        ----------
        name
            The name, an identifier unless the registry has its own pattern.
        source
            The function or class that the object is made of; the object itself by default.
        **attributes
            Attributes that the object gets, such as what a criterion needs.

        Raises
        ------
        ValueError
            If the name is not allowed, or belongs to another object.
        """
        is_name = name.isidentifier() if self._names is None else re.fullmatch(self._names, name)
        if not is_name:
            wanted = "be an identifier" if self._names is None else f"match {self._names}"
            raise ValueError(f"the name of a {self.kind} must {wanted}, got {name!r}")

        def decorate(registered: F) -> F:
            # A module that is imported again, such as in a notebook, replaces its own object.
            origin = _origin(registered if source is None else source)
            if self._origins.setdefault(name, origin) != origin:
                raise ValueError(f"the {self.kind} {name!r} is registered already")
            self._objects[name] = registered  # type: ignore[assignment]
            for attribute, value in attributes.items():
                setattr(registered, attribute, value)
            return registered

        return decorate

    def register_class(self, name: str) -> Callable[[F], F]:
        """Return a class decorator that registers a class under a name, and sets the class's ``name``.

        Parameters
        ----------
        name
            The name, an identifier unless the registry has its own pattern.

        Raises
        ------
        ValueError
            If the name is not allowed, or belongs to another class.
        """
        return self.register(name, name=name)

    def find(self, name: str) -> T:
        """Return the object registered under a name.

        Raises
        ------
        ValueError
            If no object has the name; the message lists all names.
        """
        if name not in self._objects:
            raise ValueError(
                f"{self.kind} must be one of {', '.join(self)}, got {name!r}{close_match(name, self)}"
            )
        return self._objects[name]

    def __getitem__(self, name: str) -> T:
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)


def close_match(name: object, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, if one is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _origin(registered: object) -> tuple[object, object]:
    return getattr(registered, "__module__", None), getattr(registered, "__qualname__", registered)
