from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_first_two_bash_blocks_are_one_command_each() -> None:
    first, second = [text.strip() for language, text in BLOCKS if language == "bash"][:2]
    assert "\n" not in first + second
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert "nni-jackpot search configs/digits/resnet.yml" in first
    assert second.endswith("pytest -q")


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_pasted_code_works(code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
