"""Plain text that Debian packages carry: `debian-handbook` and `bible-kjv-text`."""

from __future__ import annotations

import subprocess

from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.data.text import SHORTEST, paragraphs


def handbook() -> list[str]:
    """Return the paragraphs of Debian's handbook in English, each once."""
    return paragraphs(TextConfig(name="text"))


def bible(chapters: str = "gen1-gen50") -> list[str]:
    """Return verses of the King James Bible, several to a paragraph of `SHORTEST` characters or more."""
    lines = subprocess.run(["bible", "-f", chapters], capture_output=True, text=True, check=True).stdout
    found, current = [], ""
    for line in lines.splitlines():
        current = f"{current} {line.partition(' ')[2]}".strip()
        if len(current) > SHORTEST:
            found.append(current)
            current = ""
    return found
