"""Folders and files stay small enough for a newcomer; `.importlinter` has the import rule."""

from __future__ import annotations

from collections import Counter

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


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_can_be_read_in_one_sitting(path: object) -> None:
    lines = (ROOT / str(path)).read_text(encoding="utf-8").count("\n")
    assert lines <= 400
