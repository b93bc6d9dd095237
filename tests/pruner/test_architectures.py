"""The law of `law.py` for the networks that people use; the heavy ones where ALL_ARCHITECTURES is set."""

from __future__ import annotations

import os

import pytest
from architectures import ARCHITECTURES
from support_table import architectures_part

HEAVY = pytest.mark.skipif("ALL_ARCHITECTURES" not in os.environ, reason="ALL_ARCHITECTURES is not set")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=HEAVY if architecture.heavy else ())
        for library, architectures in ARCHITECTURES.items()
        for name, architecture in architectures.items()
    ],
)
def test_what_is_searched_is_what_runs(library: str, name: str) -> None:
    ARCHITECTURES[library][name].check()


def test_the_table_has_every_architecture() -> None:
    rows = [row for row in architectures_part().splitlines() if row.startswith("| ")][1:]
    names = [f"| {library}: {name} |" for library, found in ARCHITECTURES.items() for name in found]
    assert len(rows) == len(names), "run: python tests/architectures_table.py"
    for row, name in zip(rows, names, strict=True):
        assert row.startswith(name), "run: python tests/architectures_table.py"
