"""Functions around NNI's own, each put there once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wraps_once(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Return a decorator that puts a function around an attribute of NNI, unless one is around it already.

    The function gets the attribute's value first, then the arguments of the call.
    """
    theirs = getattr(owner, name)

    def decorate(ours: Callable[..., Any]) -> None:
        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            return ours(theirs, *args, **kwargs)

        if not hasattr(theirs, "__wrapped__"):
            setattr(owner, name, call)

    return decorate
