"""The API reference has every public name, and every public name has a docstring of the numpy convention."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from types import ModuleType

import pytest
from conftest import ROOT
from numpydoc.validate import validate

import nni_jackpot
import nni_jackpot.errors
import nni_jackpot.speedup

PAGE = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
DIRECTIVES = re.findall(r"^\.\. auto(\w+):: (\S+)$", PAGE, re.MULTILINE)
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
# Names whose parameters the first line explains; new names describe theirs in a section.
WITHOUT_PARAMETERS = {
    "nni_jackpot.LotteryJackpotPruner.compress",
    "nni_jackpot.LotteryJackpotPruner.update_masks",
    "nni_jackpot.Ticket.apply",
    "nni_jackpot.Ticket.check_base",
    "nni_jackpot.Ticket.check_writable",
    "nni_jackpot.Ticket.compare",
    "nni_jackpot.Ticket.write",
    "nni_jackpot.TicketBox.add",
    "nni_jackpot.TicketBox.use",
    "nni_jackpot.load_masks",
    "nni_jackpot.load_sparse",
    "nni_jackpot.load_ticket",
    "nni_jackpot.mask_overlap",
    "nni_jackpot.register_method",
    "nni_jackpot.save_masks",
    "nni_jackpot.speedup.check_semi_structured",
}


def documented() -> dict[str, object]:
    """Return the objects that the page documents, by their dotted names."""
    found: dict[str, object] = {}
    for _, path in DIRECTIVES:
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


def with_methods() -> list[str]:
    """Return the dotted names of what the page documents, and of the public methods of its classes."""
    return [
        name
        for path, thing in documented().items()
        if path != "nni_jackpot.__version__"
        for name in (path, *(f"{path}.{method}" for method in public_methods(thing)))
    ]


def public_methods(thing: object) -> list[str]:
    """Return the names of the public methods and properties that a class defines itself."""
    if not isinstance(thing, type):
        return []
    kinds = property, classmethod, staticmethod
    return [
        name
        for name, value in vars(thing).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, kinds))
    ]


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


@pytest.mark.parametrize("name", with_methods())
def test_every_public_name_has_a_docstring_of_the_numpy_convention(name: str) -> None:
    has_attributes = dataclasses.is_dataclass(documented().get(name))  # which are its parameters
    ignored = {"PR01"} if has_attributes or name in WITHOUT_PARAMETERS else set()
    errors = validate(name)["errors"]
    faults = [f"{code}: {text}" for code, text in errors if code not in NOT_ASKED_FOR | ignored]
    assert not faults
