"""Modules that a config names, imported for what they register, and functions that it names."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.settings import Rule, shown

MODULES = Rule(
    "of names of modules, such as my_package.my_criterion",
    lambda value: all(type(name) is str and all(map(str.isidentifier, name.split("."))) for name in value),
)

_PARTS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FUNCTION = Rule("of the form module:function", lambda value: bool(_PARTS.fullmatch(value)))


def function_named(name: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names; raises ValueError if there is none."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"{module} has no function {function}")
    return cast(Callable[..., Any], found)


def import_function(name: object, key: str, folder: Path) -> None:
    """Import the module of a function that a config names, as `import_plugins` does."""
    if not isinstance(name, str) or not FUNCTION.holds(name):
        return  # the schema refuses it
    _import([name.partition(":")[0]], folder.resolve(), key)
    try:
        function_named(name)
    except ValueError as error:
        raise Invalid(key, f"found {name}, but {error}") from None


def import_plugins(names: object, folder: Path) -> None:
    """Import modules, from a folder or from where Python looks for modules.

    Parameters
    ----------
    names
        The value of the key ``plugins``.
    folder
        Folder of the YAML file, on the import path for the time of the call.

    Raises
    ------
    Invalid
        If the value is not a list of names, or a module cannot be imported; names the module and the reason.
    """
    if not isinstance(names, list) or not MODULES.holds(names):
        raise Invalid("plugins", f"found {shown(names)}, allowed: a list {MODULES.allowed}")
    _import(names, folder.resolve(), "plugins.{}")


def _import(names: Sequence[str], folder: Path, keys: str) -> None:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        for number, name in enumerate(names):
            key = keys.format(number)
            try:
                module = importlib.import_module(name)
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                wanted = "a module in the folder of the file, or where Python looks for modules (PYTHONPATH)"
                raise Invalid(key, f"cannot import {name!r}: {said}; allowed: {wanted}") from error
            own = folder.joinpath(*name.split("."))
            there = [path for path in (own.with_suffix(".py"), own / "__init__.py") if path.is_file()]
            file = getattr(module, "__file__", None)
            if there and (file is None or not os.path.samefile(there[0], file)):
                raise Invalid(key, f"{name!r} is {there[0]}, but {file} has been imported under this name")
    finally:
        sys.path.remove(str(folder))
