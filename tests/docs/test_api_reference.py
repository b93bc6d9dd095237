"""The API reference has every public name, and every public name has a docstring of the numpy convention."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from numpydoc.validate import validate

import nni_jackpot
import nni_jackpot.errors
import nni_jackpot.speedup

PAGE = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
DIRECTIVES = re.findall(r"^\.\. auto\w+:: (\S+)$", PAGE, re.MULTILINE)
# Functions that register algorithms, wherever they are defined.
DECORATORS = {
    name
    for path in (ROOT / "nni_jackpot").rglob("*.py")
    for name in re.findall(
        r"^(?:def )?(register_\w+)(?: =|\()", path.read_text(encoding="utf-8"), re.MULTILINE
    )
}
# What numpydoc asks for and we do not: "See Also", "Examples" and extended summaries everywhere, types beside
# annotations, and "Returns" where the first line says it.
NOT_ASKED_FOR = {"SA01", "EX01", "ES01", "PR04", "RT01"}
# Functions of several parameters without a section on them; the list may only become shorter.
WITHOUT_PARAMETERS = {
    "nni_jackpot.Ticket.compare",
    "nni_jackpot.TicketBox.add",
    "nni_jackpot.mask_overlap",
    "nni_jackpot.save_masks",
    "nni_jackpot.speedup.check_semi_structured",
}


def documented() -> dict[str, object]:
    """Return the objects that the page documents, by their dotted names."""
    found: dict[str, object] = {}
    for path in DIRECTIVES:
        module, _, name = path.rpartition(".")
        thing = getattr(import_module(module), name)
        if isinstance(thing, ModuleType):
            found |= {f"{path}.{kind.__name__}": kind for kind in classes_of(thing)}
        else:
            found[path] = thing
    return found


def classes_of(module: ModuleType) -> list[type]:
    """Return the public classes that a module defines."""
    kinds = [value for value in vars(module).values() if isinstance(value, type)]
    return [
        kind for kind in kinds if kind.__module__ == module.__name__ and not kind.__name__.startswith("_")
    ]


def with_methods() -> dict[str, Any]:
    """Return what the page documents, and the public methods and properties of its classes."""
    found: dict[str, Any] = {}
    for path, thing in documented().items():
        found[path] = thing
        if isinstance(thing, type):
            own = [name for name, value in vars(thing).items() if is_method(name, value)]
            found |= {f"{path}.{name}": getattr(thing, name) for name in own}
    del found["nni_jackpot.__version__"]
    return found


def is_method(name: str, value: object) -> bool:
    """Return True if an attribute of a class is a public method or property."""
    kinds = property, classmethod, staticmethod
    return not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))


def is_plain(name: str, thing: Any) -> bool:
    """Return True if the parameters of a documented object need no section."""
    if isinstance(thing, type):
        return dataclasses.is_dataclass(thing)  # whose attributes are described
    if not callable(thing) or name in WITHOUT_PARAMETERS:
        return True
    return len(inspect.signature(thing).parameters.keys() - {"self"}) < 2


@pytest.mark.parametrize(
    "module", [nni_jackpot, nni_jackpot.speedup, nni_jackpot.errors], ids=lambda module: module.__name__
)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    classes = [kind.__name__ for kind in classes_of(module)]
    known = {id(thing) for thing in documented().values()}
    missing = [name for name in getattr(module, "__all__", classes) if id(getattr(module, name)) not in known]
    assert not missing, f"docs/reference/api.md lacks {', '.join(missing)}"


def test_every_decorator_of_the_registries_is_in_the_reference() -> None:
    missing = DECORATORS - {path.rpartition(".")[2] for path in documented()}
    assert not missing, f"docs/reference/api.md lacks {', '.join(sorted(missing))}"


@pytest.mark.parametrize(("name", "thing"), with_methods().items(), ids=with_methods())
def test_every_public_name_has_a_docstring_of_the_numpy_convention(name: str, thing: Any) -> None:
    ignored = NOT_ASKED_FOR | ({"PR01"} if is_plain(name, thing) else set())
    faults = [f"{code}: {text}" for code, text in validate(name)["errors"] if code not in ignored]
    assert not faults
