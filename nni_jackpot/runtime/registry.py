"""Registries: algorithms by name, open to code outside the package."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F")
K = TypeVar("K", bound=type[Any])


class Registry(Mapping[str, T]):
    """Named objects of one kind, such as criteria or budgets.

    Parameters
    ----------
    kind
        Kind of the objects, for error messages: ``"criterion"``.
    is_name
        Whether a name is possible; by default, identifiers are.

    Examples
    --------
    >>> BUDGETS = Registry[Rule]("budget")
    >>> @BUDGETS.register("half")
    ... def half(units, importance): ...
    """

    def __init__(self, kind: str, is_name: Callable[[str], bool] = str.isidentifier) -> None:
        self.kind = kind
        self._is_name = is_name
        self._objects: dict[str, T] = {}
        self._origins: dict[str, object] = {}

    def register(self, name: str, source: object = None) -> Callable[[F], F]:
        """Return a decorator that registers an object under a name.

        Parameters
        ----------
        name
            The name, an identifier.
        source
            The function or class that the object is made of; the object itself by default.

        Raises
        ------
        ValueError
            If the name is not an identifier, or belongs to another object.
        """
        if not self._is_name(name):
            raise ValueError(f"the name of a {self.kind} must be an identifier, got {name!r}")

        def decorate(registered: F) -> F:
            # A module that is imported again, such as in a notebook, replaces its own object.
            origin = _origin(registered if source is None else source)
            if self._origins.setdefault(name, origin) != origin:
                raise ValueError(f"the {self.kind} {name!r} is registered already")
            self._objects[name] = registered  # type: ignore[assignment]
            return registered

        return decorate

    def register_class(self, name: str) -> Callable[[K], K]:
        """Return a class decorator that registers a class under a name, and sets the class's ``name``.

        Parameters
        ----------
        name
            The name, an identifier.

        Raises
        ------
        ValueError
            If the name is not an identifier, or belongs to another class.
        """

        def decorate(registered: K) -> K:
            self.register(name)(registered)
            registered.name = name
            return registered

        return decorate

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
