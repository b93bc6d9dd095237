"""The check of the project's wording: planted phrases are found, and ordinary English is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / ".ci" / "words.py"


def check(*arguments: object) -> tuple[int, list[str]]:
    """Run the check; return its exit code and the lines that it prints."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "text", "line", "phrase"),
    [
        ("page.md", "# Title\n\nMasks are made anew.\n", 3, "anew"),
        ("page.md", "Files are whole, but\nfor the last one.\n", 1, "but for"),
        ("code.py", '"""Nothing."""\n\n\ndef f():\n    """See that it works."""\n', 5, "See that"),
        ("code.py", "x = 1\n# read by\n# whoever needs it\n", 3, "whoever"),
        ("code.py", "# the weights are\n# no floats\n", 1, "are no floats"),
        ("nni_jackpot/code.py", "x = f'{y} is no folder'\n", 1, "is no folder"),
    ],
)
def test_planted_phrases_are_found(tmp_path: Path, name: str, text: str, line: int, phrase: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    code, lines = check(tmp_path)
    assert code == 1
    assert lines[0].startswith(f"{path}:{line}: '{phrase}")
    assert ": write " in lines[0]


def test_plain_english_and_code_pass(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        '"""There is no such file. The mask is no longer soft. Weights that go on the GPU, one at a time."""\n'
        "anew = lest = 1  # the shape is that of the weight\n"
        "expected = 'is no folder'\n",
        encoding="utf-8",
    )
    assert check(tmp_path) == (0, [])


def test_counts_per_folder(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("whoever, anew\n", encoding="utf-8")
    assert check("--count", tmp_path) == (1, [f"    2 {tmp_path}"])
