"""Every key of a run's YAML file with its default and meaning: as a commented file, and as a page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from nni_jackpot.experiment.comparators import COMPARATORS
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.data.preprocess import Preprocess
from nni_jackpot.experiment.data.section import DataConfig, TextConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.models.section import ModelConfig, TransformersConfig
from nni_jackpot.experiment.schema.rules import allowed_text
from nni_jackpot.masking.methods.method import METHODS
from nni_jackpot.runtime.settings import ANY
from nni_jackpot.search.blockwise import BlockSearch
from nni_jackpot.search.blockwise.polish import Polish

_WIDTH = 110
# Sections for images, and for text, with the choice of the latter.
_FORMS: dict[str, tuple[Any, Any, str]] = {
    "data": (DataConfig, TextConfig, "name: text"),
    "model": (ModelConfig, TransformersConfig, "name: transformers/..."),
}


class Key(NamedTuple):
    """A key: its name, its default as YAML (empty if it is required), what it allows and means."""

    name: str
    default: str
    allowed: str
    doc: str


@dataclass(frozen=True)
class Section:
    """Keys that stand together.

    Attributes
    ----------
    name
        Dotted name of the section; empty for the top level.
    doc
        What the section is about.
    keys
        The keys.
    choice
        The choice that the keys depend on, such as ``method: supermask``; empty if they always exist.
    """

    name: str
    doc: str
    keys: list[Key]
    choice: str = ""


def sections() -> Iterator[Section]:
    """Iterate over all sections of a YAML file, with those of registered methods and comparators."""
    kinds = get_type_hints(RunConfig)
    own = [entry for entry in fields(RunConfig) if not is_dataclass(kinds[entry.name])]
    yield Section(
        "", "", [_key(entry, kinds[entry.name]) for entry in own if "registry" not in entry.metadata]
    )
    for entry in fields(RunConfig):
        if is_dataclass(kinds[entry.name]):
            yield from _variants(entry.name, kinds[entry.name])
        if entry.name == "data":
            yield _section("data.preprocess", Preprocess)
        if entry.name == "search":
            yield _section("search.blockwise", BlockSearch)
            yield _section("search.polish", Polish)
            for method in METHODS:
                yield _of_method(method)
        if entry.name == "comparators":
            for name in COMPARATORS:
                yield _section(f"comparators.{name}", COMPARATORS.find(name))


def _variants(name: str, cls: Any) -> Iterator[Section]:
    """Return a section, and its other forms, whose keys depend on its name."""
    if not hasattr(cls, "choose"):
        yield _section(name, cls)
        return
    usual, text, choice = _FORMS[name]
    yield _section(name, usual)
    yield replace(_section(name, text), choice=choice)


def keys_of(name: str, cls: Any, raw: Mapping[str, Any]) -> list[Key]:
    """Return the keys of a section, or of the top level, for what the section holds."""
    if hasattr(cls, "choose"):
        cls = cls.choose(raw)
    if name:
        method = [_of_method(raw.get("method", next(iter(METHODS))))] if name == "search" else []
        return [key for section in (_section(name, cls), *method) for key in section.keys]
    return next(sections()).keys


def _section(name: str, cls: Any) -> Section:
    kinds = get_type_hints(cls)
    keys = [_key(entry, kinds[entry.name]) for entry in fields(cls) if "base" not in entry.metadata]
    return Section(name, _first_line(cls), keys)


def _of_method(name: str) -> Section:
    """Return the settings of a search method, with the values of its recipes."""
    cls = METHODS.find(name)
    kinds = get_type_hints(cls)
    (_, usual), *others = cls.recipes().items()
    keys = []
    for entry in fields(cls):
        key = _key(entry, kinds[entry.name])
        values = {recipe: _yaml(getattr(settings, entry.name)) for recipe, settings in others}
        said = [f"recipe {recipe}: {value}" for recipe, value in values.items() if value != key.default]
        default = _yaml(getattr(usual, entry.name))
        keys.append(key._replace(default=default, doc="; ".join([key.doc, *said])))
    return Section("search", _first_line(cls), keys, f"method: {name}")


def _key(entry: Field[Any], kind: Any) -> Key:
    is_required = entry.default is MISSING or (entry.default is None and NoneType not in get_args(kind))
    default = "" if is_required else _yaml(entry.default)
    allowed = allowed_text(kind, entry.metadata.get("rule", ANY))
    return Key(entry.name, default, allowed, entry.metadata.get("doc", ""))


def _first_line(cls: Any) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def yaml_text() -> str:
    """Return a YAML file of all keys with their defaults, and their meaning as comments.

    Keys that depend on a choice other than the default, and the comparators, are comments as well.
    """
    lines = ["# Every key of a run, with its default. A key without a value is required."]
    known: set[str] = set()
    for section in sections():
        parent, _, name = section.name.partition(".")
        indent = "  " if parent and not name else ""
        is_chosen = section.choice in ("", f"method: {next(iter(METHODS))}")
        before = "#     " if name else indent if is_chosen else f"{indent}# "
        lines += ["", *comment(section.doc, indent if section.choice else "")] if section.doc else []
        lines += [f"{indent}# With {section.choice}:"] if section.choice else []
        if parent and parent not in known:
            lines.append(f"# {parent}:" if name else f"{parent}:")
            known.add(parent)
        lines += [f"#   {name}:"] if name else []
        for key in section.keys:
            lines += comment(f"{key.doc} ({key.allowed})", before if name else indent)
            lines.append(f"{before}{key.name}: {key.default}".rstrip())
    return "\n".join(lines) + "\n"


def comment(text: str, indent: str = "") -> list[str]:
    """Return text as lines of a comment."""
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def markdown() -> str:
    """Return the reference page of all keys."""
    parts = [
        "# Keys of a run's YAML file",
        "Generated by `nni-jackpot config --markdown`; do not edit. An unknown key, a missing key or a value"
        " out of range is one error that names the key. A dotted name overrides a key:"
        " `--set search.lr=0.01`.",
    ]
    for section in sections():
        title = f"`{section.name}`" if section.name else "Top level"
        parts.append(f"## {title}{f', with `{section.choice}`' if section.choice else ''}")
        parts += [section.doc] if section.doc else []
        rows = [
            [f"`{key.name}`", f"`{key.default}`" if key.default else "required", key.allowed, key.doc]
            for key in section.keys
        ]
        parts.append(_table(["key", "default", "allowed", "meaning"], rows))
    rows = []
    for name in DATASETS:
        spec = DATASETS.find(name)
        shape = "x".join(map(str, spec.shape)) if spec.shape else "of the files"
        counts = [f"{count:,}" if count else "of the files" for count in (spec.classes, spec.train_images)]
        rows.append([f"`{name}`", shape, *counts, "yes" if spec.downloadable else "no"])
    columns = ["name", "image", "classes", "training images", "`download: true`"]
    parts += ["## Data sets", _table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
