"""Interrupt runs at every change of a file and at random moments, and check that nothing is lost or mixed.

``python tests/kill/campaign.py`` does all of it, in some ten minutes, and prints the table of
docs/reliability.md; ``--small`` a twentieth of it, and ``--save FILE`` puts the table into a page.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attempts import Attempt, End, Fate, at_event, events_of, kill, no_file_above, no_space

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers" / "runs"))

from tiny_runs import copied, files_in, outcome, write_file

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.folder.result import load_result

# Settings for the shortest runs with every phase: one step of pre-training and of tuning, two of search.
SHORT = "data.train_images=32", "data.validation_images=32", "data.batch_size=32", "finetune.under=initial"
OTHERS = "seed=1", "search.lr=0.5", "finetune.epochs=0"
# Messages of a command that finds another process, or its results, in the folder.
REFUSALS = "is in use by process", "holds a finished run of other settings"
BEGIN, END = "<!-- campaign -->\n", "<!-- end of campaign -->"


@dataclass
class Row:
    """A kind of interruption, and the counts of its outcomes.

    Attributes
    ----------
    command, tried
        The command and the interruption, in words.
    tries
        Number of tries.
    hit
        Number of processes that the interruption ended; others ended by themselves before it.
    wrong
        Violated expectations, one line each.
    """

    command: str
    tried: str
    tries: int = 0
    hit: int = 0
    wrong: list[str] = field(default_factory=list)

    def differ(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Record the files that differ from the expected ones."""
        names = sorted({*found, *wanted})
        if differing := [name for name in names if found.get(name) != wanted.get(name)]:
            self.wrong.append(f"{self.command}, {self.tried}, {self.tries}: {', '.join(differing)}")

    def expect(self, holds: bool, text: str) -> None:
        """Record a violated expectation."""
        if not holds:
            self.wrong.append(f"{self.command}, {self.tried}, {self.tries}: {text}")


class Campaign:
    """All interruptions, each starting from the same state of a folder.

    Parameters
    ----------
    root
        An empty folder.
    share
        One of ``share`` tries is made.
    """

    def __init__(self, root: Path, share: int) -> None:
        self.root, self.share = root, share
        self.out, self.kept = root / "out", root / "kept"
        self.file = write_file(root)
        self.rows: list[Row] = []
        self.kept.mkdir()
        self.whole = self._reference(self.search())
        self.seconds = self._seconds(self.search())
        copied(self.out, self.kept / "finished")
        # Kept for runs that skip the training of weights, and for runs that replace a finished one.
        copied(root / "cache", self.kept / "cache")

    def search(self, *settings: str, flags: tuple[str, ...] = ()) -> list[str]:
        """Return the arguments of a search with settings beside the usual ones."""
        sets = [word for text in (*SHORT, *settings) for word in ("--set", text)]
        return ["search", str(self.file), *sets, *flags]

    def _reference(self, arguments: list[str]) -> dict[str, Any]:
        end = Attempt(arguments).wait()
        if end.code != 0:
            raise RuntimeError(f"{arguments} ended with {end.code}: {end.said}")
        return outcome(self.out)

    def _seconds(self, arguments: list[str]) -> float:
        self.fresh()
        began = time.perf_counter()
        self._reference(arguments)
        return time.perf_counter() - began

    def fresh(self, *kept: str) -> None:
        """Reset the folder to copies of the kept files: a finished run, weights."""
        for name in ("out", "cache", "report"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name, place in (("finished", "out"), ("cache", "cache")):
            if name in kept:
                copied(self.kept / name, self.root / place)

    def row(self, command: str, tried: str) -> Row:
        """Start a row of the table."""
        print(f"{command}: {tried}", file=sys.stderr, flush=True)
        self.rows.append(Row(command, tried))
        return self.rows[-1]

    def some(self, numbers: range) -> Iterable[int]:
        """Return the selected part of the numbers."""
        return numbers[random.randrange(min(self.share, len(numbers))) :: self.share]

    # -- signals

    def searches_at_events(self) -> None:
        """Kill a search before each change of a file."""
        row = self.row("search", "kill -9 before each change of a file")
        self.fresh()
        for number in self.some(range(1, events_of(self.root, self.search()) + 1)):
            self.fresh()
            self._end(row, Attempt(self.search(), at_event(self.root, number, kill)).wait(), signal.SIGKILL)
            self._again(row, self.search(), self.whole, [self.whole])

    def searches_at_moments(self) -> None:
        """Send signals at random moments to a search, and to a resumed search."""
        for number, name, tries in (
            (signal.SIGKILL, "kill -9", 20),
            (signal.SIGTERM, "kill", 10),
            (signal.SIGINT, "Ctrl+C", 10),
        ):
            row = self.row("search", f"{name} at two random moments")
            for _ in self.some(range(tries)):
                self.fresh()
                for _ in range(2):
                    end = Attempt(self.search()).send(number, random.uniform(0.05, self.seconds))
                    self._end(row, end, number)
                self._again(row, self.search(), self.whole, [self.whole])

    def replacements_at_events(self) -> None:
        """Kill a search that replaces a finished run, before each change of a file."""
        arguments = self.search(*OTHERS, flags=("--overwrite",))
        row = self.row("search --overwrite", "kill -9 before each change of a file")
        self.fresh("finished", "cache")
        count = events_of(self.root, arguments)
        other = outcome(self.out)
        for number in self.some(range(1, count + 1)):
            self.fresh("finished", "cache")
            self._end(row, Attempt(arguments, at_event(self.root, number, kill)).wait(), signal.SIGKILL)
            places = self.out, self.out / ".replacement", self.out / ".replacement.whole"
            row.expect(any((place / "results.json").exists() for place in places), "no finished run is left")
            self._again(row, arguments, other, [self.whole, other])

    def exports_and_reports(self) -> None:
        """Kill an export and a report before each change of a file."""
        for command, arguments, place in (
            ("export", ["export", str(self.out)], self.out / "jackpot.ticket"),
            ("report", ["report", str(self.out), "-o", str(self.root / "report")], self.root / "report"),
        ):
            row = self.row(command, "kill -9 before each change of a file")
            self.fresh("finished", "cache")
            count = events_of(self.root, arguments)
            wanted = _content(place)
            for number in self.some(range(1, count + 1)):
                self.fresh("finished", "cache")
                self._end(row, Attempt(arguments, at_event(self.root, number, kill)).wait(), signal.SIGKILL)
                found = _content(place)
                row.expect(
                    all(wanted.get(name) == found[name] for name in found), "a part of a file is there"
                )
                row.expect(Attempt(arguments).wait().code == 0, "the same command failed")
                row.differ(_content(place), wanted)

    def _end(self, row: Row, end: End, number: signal.Signals) -> None:
        row.tries += 1
        row.hit += end.code in (-number, 128 + number)

    def _again(
        self, row: Row, arguments: list[str], wanted: dict[str, Any], believed: list[dict[str, Any]]
    ) -> None:
        """Run the same command again; a run that was reported as finished must be complete."""
        try:
            result = load_result(self.out)
            result.check_files(*result.files)
        except JackpotError:
            pass
        else:
            found = _without_traces(outcome(self.out))
            row.expect(found in map(_without_traces, believed), "results of no run pass for finished")
        end = Attempt(arguments).wait()
        row.expect(end.code == 0, f"the same command ended with {end.code}: {end.said}")
        row.differ(outcome(self.out), wanted)

    # -- full disks

    def full_disks(self) -> None:
        """Simulate a full disk from each change of a file on, then space again."""
        row = self.row("search", "no room on the disk from a change of a file on")
        self.fresh()
        for number in self.some(range(1, events_of(self.root, self.search()) + 1, 5)):
            self._full(row, at_event(self.root, number, no_space))
        row = self.row("search", "no room for files above a size")
        largest = max(path.stat().st_size for path in self.out.rglob("*"))
        for number in self.some(range(20)):
            self._full(row, no_file_above(number * largest // 20))

    def _full(self, row: Row, fate: Fate) -> None:
        self.fresh()
        end = Attempt(self.search(), fate).wait()
        row.tries += 1
        row.hit += end.code != 0
        if end.code != 0:
            row.expect(end.code == 2, f"the exit code is {end.code}: {end.said[-500:]}")
            row.expect(end.said.count("\n") == 1, f"more than a line: {end.said[-500:]}")
        self._again(row, self.search(), self.whole, [self.whole])

    # -- two processes

    def two_processes(self) -> None:
        """Let two processes search in one folder."""
        brief = "finetune.epochs=0", "search.epochs=1"
        one, same, other = self.search(*brief), self.search(*brief), self.search(*brief, "search.lr=0.5")
        replacing = [self.search(*brief, *more, flags=("--overwrite",)) for more in ((), ("search.lr=0.5",))]
        for tried, pair, rounds in (
            ("two processes, the same settings", (one, same), 80),
            ("two processes, other settings", (one, other), 80),
            ("two processes, other settings, --overwrite", (replacing[0], replacing[1]), 40),
        ):
            row = self.row("search", tried)
            wanted = []
            for arguments in pair:
                self.fresh("cache")
                wanted.append(self._reference(arguments))
            for _ in self.some(range(rounds)):
                self.fresh("cache")
                attempts = []
                for number in random.sample((0, 1), 2):
                    attempts.append((number, Attempt(pair[number])))
                    time.sleep(random.choice((0, random.uniform(0, self.seconds))))
                self._both(row, [(number, attempt.wait()) for number, attempt in attempts], wanted)

    def _both(self, row: Row, ends: list[tuple[int, End]], wanted: list[dict[str, Any]]) -> None:
        row.tries += 1
        for _, end in ends:
            row.hit += end.code == 2
            row.expect(end.code in (0, 2), f"the exit code is {end.code}: {end.said}")
            if end.code == 2:
                row.expect(any(text in end.said for text in REFUSALS), end.said)
                row.expect(end.said.count("\n") == 1, f"more than a line: {end.said}")
        found = outcome(self.out)
        ours = [wanted[number] for number, end in ends if end.code == 0]
        row.expect(found in ours, "a mixed result")


def _content(place: Path) -> dict[str, bytes]:
    if place.is_dir():
        return {name: content for name, content in files_in(place).items() if not name.endswith(".part")}
    return {place.name: place.read_bytes()} if place.exists() else {}


def _without_traces(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out files that only the same command removes: checkpoints and temporary files."""
    traces = "checkpoint.pth", "epoch.pth", ".part", ".lock.pid"
    return {
        name: value
        for name, value in found.items()
        if not name.endswith(traces) and not name.startswith(".replacement")
    }


def table(rows: list[Row]) -> str:
    """Return the table in Markdown, with its totals."""
    lines = [
        "| command | what was tried | times | ended by it | differences |",
        "| --- | --- | --: | --: | --: |",
        *(f"| {row.command} | {row.tried} | {row.tries} | {row.hit} | {len(row.wrong)} |" for row in rows),
    ]
    signals = sum(row.hit for row in rows if "kill" in row.tried or "Ctrl" in row.tried)
    rounds = sum(row.tries for row in rows if "two processes" in row.tried)
    mixed = sum(len(row.wrong) for row in rows if "two processes" in row.tried)
    wrong = sum(len(row.wrong) for row in rows) - mixed
    lines += [
        "",
        f"{signals} signals and {wrong} differences; {rounds} rounds of two processes, {mixed} mixed.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, print its table, and return 1 if an expectation was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="only one of twenty tries")
    parser.add_argument("--save", metavar="FILE", type=Path, help="page that contains the table")
    parser.add_argument("--seed", type=int, help="seed of the random moments")
    options = parser.parse_args()
    seed = random.randrange(1000) if options.seed is None else options.seed
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder).resolve(), 20 if options.small else 1)
        began = time.perf_counter()
        campaign.searches_at_events()
        campaign.searches_at_moments()
        campaign.replacements_at_events()
        campaign.exports_and_reports()
        campaign.full_disks()
        campaign.two_processes()
    text = f"{table(campaign.rows)}\n\n{time.perf_counter() - began:.0f} s, random moments of seed {seed}."
    print(text)
    wrong = [line for row in campaign.rows for line in row.wrong]
    print(*wrong, sep="\n", file=sys.stderr)
    if options.save is not None:
        before, rest = options.save.read_text(encoding="utf-8").split(BEGIN)
        after = rest[rest.index(END) :]
        options.save.write_text(f"{before}{BEGIN}{text}\n{after}", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
