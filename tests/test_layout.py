"""Folders and files stay small enough for a newcomer; `.importlinter` has the import rule."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache

import grimp
import pytest
from conftest import ROOT

FILES = sorted(
    path.relative_to(ROOT) for folder in ("nni_jackpot", "tests") for path in (ROOT / folder).rglob("*.py")
)


def test_no_folder_has_more_than_twelve_files() -> None:
    crowded = {
        str(folder): count for folder, count in Counter(path.parent for path in FILES).items() if count > 12
    }
    assert not crowded


def test_the_longest_chain_between_wings_has_nine_imports() -> None:
    graph = grimp.build_graph("nni_jackpot", exclude_type_checking_imports=True, cache_dir=None)
    imports: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules - {"nni_jackpot"}:
        for imported in graph.find_modules_directly_imported_by(module) - {"nni_jackpot"}:
            imports[module.split(".")[1]].add(imported.split(".")[1])

    @cache
    def longest(wing: str) -> int:
        return max((1 + longest(other) for other in imports[wing] - {wing}), default=0)

    assert longest("__main__") == max(map(longest, list(imports))) <= 9


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_can_be_read_in_one_sitting(path: object) -> None:
    lines = (ROOT / str(path)).read_text(encoding="utf-8").count("\n")
    assert lines <= 400
