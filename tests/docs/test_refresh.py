"""The tables of the pages are printed again by their commands."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PAGE = """\
# Results

```text
$ search --sweep seed=0,1
┌───────┬──────────────┐
│ dense │ 98.80 ± 0.32 │
│ found │ 99.35 ± 0.10 │
└───────┴──────────────┘
search: 8.7 s a run
$ evaluate \\
      --all
kept: 90.0%
```

```bash
$ not a block of output
```
"""
OUTPUT = """\
loading
┌───────┬─────────────┐
│ dense │ 98.9 ± 0.32 │
│ found │ 99.1 ± 0.20 │
└───────┴─────────────┘
search: 20.1 s a run
"""


@pytest.fixture(scope="module")
def refresh() -> Any:
    return runpy.run_path(str(ROOT / "docs" / "refresh.py"))["refresh"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def run(command: str) -> str:
    return {"search --sweep seed=0,1\n": OUTPUT, "evaluate \\\n      --all\n": "kept: 90.0%\n"}[command]


def test_numbers_that_changed_beyond_their_spread(refresh: Any, page: Path) -> None:
    assert refresh(page, run, write=False) == ["- │ found │ 99.35 ± 0.10 │\n+ │ found │ 99.1 ± 0.20 │"]
    assert page.read_text(encoding="utf-8") == PAGE


def test_blocks_are_replaced(refresh: Any, page: Path) -> None:
    refresh(page, run, write=True)
    shown = OUTPUT.removeprefix("loading\n")
    old = PAGE[PAGE.index("┌") : PAGE.index("$ evaluate")]
    assert page.read_text(encoding="utf-8") == PAGE.replace(old, shown)
    assert refresh(page, run, write=False) == []


@pytest.mark.parametrize(
    ("output", "said"), [(None, "takes longer"), ("kept 90.0%\n", "is not printed any more")]
)
def test_blocks_that_cannot_be_replaced(refresh: Any, page: Path, output: str | None, said: str) -> None:
    changes = refresh(page, lambda command: output, write=True)
    assert said in changes[0]
    assert page.read_text(encoding="utf-8") == PAGE


def test_a_number_without_a_spread(refresh: Any, page: Path) -> None:
    page.write_text("```text\n$ run\nparameters: 0.51, layer1.0.conv2\n```\n", encoding="utf-8")
    assert refresh(page, lambda command: "parameters: 0.51, layer1.0.conv2\n", write=False) == []
    (change,) = refresh(page, lambda command: "parameters: 0.52, layer1.0.conv2\n", write=False)
    assert "0.52" in change


def test_a_table_after_a_command_is_left_to_its_author(refresh: Any, page: Path) -> None:
    page.write_text("```text\n$ run\n```\n\n| a | 1 |\n", encoding="utf-8")
    assert refresh(page, run, write=True) == []
