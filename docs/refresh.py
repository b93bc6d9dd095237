"""Run the commands whose output the pages show, and print the numbers that changed.

Run it with: python docs/refresh.py [PAGE ...] [--write] [--limit SECONDS]

A command is a line ``$ COMMAND`` of a fenced ``text`` block, and what it prints follows, whole or in part.
Commands run with one thread, in a new folder beside the repository's configs and examples. A command that
takes longer than the limit is stopped, and its block stays.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(?<=^```text\n)\$ .*?(?=^```$)", re.DOTALL | re.MULTILINE)
# A number that follows no letter, its spread, and the unit of a time, which differs in every run.
_NUMBER = re.compile(r"(?<![\w.-])-?(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: ± (\d+(?:\.\d+)?))?( m?s\b)?")

Run = Callable[[str], "str | None"]
"""Run a command and return what it prints; None if it takes too long."""


@dataclass(frozen=True)
class Line:
    """A line of output, as a pattern and its numbers."""

    text: str

    @property
    def pattern(self) -> str:
        """The line without its numbers, and without what depends on their width."""
        return re.sub(r"─+", "─", " ".join(_NUMBER.sub("#", self.text).split()))

    def differs(self, other: Line) -> bool:
        """Return True if a number differs by more than the spread of either; times do not count."""
        for mine, theirs in zip(_NUMBER.finditer(self.text), _NUMBER.finditer(other.text), strict=True):
            spread = max(float(mine[2] or 0), float(theirs[2] or 0))
            # A tolerance for the rounding of the three numbers.
            if not mine[3] and abs(float(mine[1]) - float(theirs[1])) > spread + 1e-9:
                return True
        return False


def refreshed(block: str, run: Run) -> tuple[str, list[str]]:
    """Return a block with the numbers of new runs, and a description of what changed.

    Parameters
    ----------
    block
        Commands, each after ``$``, and lines of their output.
    run
        Runs a command.
    """
    lines, changes = [], []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        match = re.match(r"(?:.*\\\n)*.*\n", part)
        assert match is not None  # a block ends with a line
        command, shown = match[0], part[match.end() :].splitlines()
        lines.append(f"$ {command.rstrip()}")
        if not any(shown):  # numbers in a table after the block
            lines += shown
            continue
        output = run(command)
        if output is None:
            changes.append(f"? {command.rstrip()}\n  takes longer than the limit")
            lines += shown
            continue
        printed = [Line(line) for line in output.splitlines()]
        for old in map(Line, shown):
            at = next((i for i, line in enumerate(printed) if line.pattern == old.pattern), None)
            if at is None:
                changes.append(f"- {old.text}\n  is not printed any more")
                lines.append(old.text)
                continue
            new = printed[at]
            del printed[: at + 1]
            if old.differs(new):
                changes.append(f"- {old.text}\n+ {new.text}")
            lines.append(new.text)
    return "\n".join(lines) + "\n", changes


def refresh(page: Path, run: Run, write: bool) -> list[str]:
    """Run the commands of a page; return what changed, and write the new blocks if asked for."""
    text, changes = page.read_text(encoding="utf-8"), []

    def replace(match: re.Match[str]) -> str:
        block, changed = refreshed(match[0], run)
        changes.extend(changed)
        return block

    text = _BLOCK.sub(replace, text)
    if write:
        page.write_text(text, encoding="utf-8")
    return changes


def _runner(folder: Path, limit: float) -> Run:
    """Return a function that runs commands in a folder, each of them once."""
    outputs: dict[str, str | None] = {}
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}

    def run(command: str) -> str | None:
        if command not in outputs:
            print(f"$ {command}", end="", flush=True)
            process = subprocess.Popen(
                command,
                shell=True,
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                outputs[command] = process.communicate(timeout=limit)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                outputs[command] = None
        return outputs[command]

    return run


def main() -> int:
    """Refresh pages; the exit status is 1 if a number changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", metavar="PAGE", type=Path, nargs="*", help="default: all pages")
    parser.add_argument("--write", action="store_true", help="replace the blocks of the pages")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a command; default: 120")
    options = parser.parse_args()
    pages = options.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    with tempfile.TemporaryDirectory() as folder:
        run = _runner(Path(folder), options.limit)
        changes = {page: refresh(page, run, options.write) for page in pages}
    for page, changed in changes.items():
        for change in changed:
            print(f"{page}:\n{change}")
    return int(any(changes.values()))


if __name__ == "__main__":
    sys.exit(main())
