"""The Python code of a guide runs, its blocks one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

GUIDES = {
    page.stem: re.findall(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for page in sorted((ROOT / "docs" / "guides").glob("*.md"))
}


@pytest.mark.parametrize("guide", [name for name, blocks in GUIDES.items() if blocks])
def test_the_code_of_a_guide_runs(guide: str, tmp_path: Path) -> None:
    code = "\n".join(GUIDES[guide])
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
