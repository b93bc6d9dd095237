"""Plain text that Debian packages carry: `debian-handbook` and `bible-kjv-text`."""

from __future__ import annotations

import html.parser
import re
import subprocess
from pathlib import Path

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
SHORTEST = 120


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of every ``<div class="para">``; an inner paragraph ends the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            is_paragraph = dict(attrs).get("class") == "para"
            self._open.append(is_paragraph)
            if is_paragraph:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if any(self._open):
            self.found[-1] += data


def handbook(folder: Path = HANDBOOK) -> list[str]:
    """Return the paragraphs of Debian's handbook in English, each once, longer than `SHORTEST` characters."""
    paragraphs: dict[str, None] = {}
    for page in sorted(folder.glob("*.html")):
        parser = _Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        for text in parser.found:
            text = re.sub(r"\s+", " ", text).strip()
            if len(text) > SHORTEST:
                paragraphs[text] = None
    if not paragraphs:
        raise SystemExit(f"no text in {folder}: apt install debian-handbook")
    return list(paragraphs)


def bible(chapters: str = "gen1-gen50") -> list[str]:
    """Return verses of the King James Bible, several to a paragraph of `SHORTEST` characters or more."""
    lines = subprocess.run(["bible", "-f", chapters], capture_output=True, text=True, check=True).stdout
    paragraphs, current = [], ""
    for line in lines.splitlines():
        current = f"{current} {line.partition(' ')[2]}".strip()
        if len(current) > SHORTEST:
            paragraphs.append(current)
            current = ""
    return paragraphs
