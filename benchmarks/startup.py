"""Time what a process waits for before it works: imports, help, errors in a file, the first line of a run.

Each program runs in a separate process, alternately, so that a slow phase of the machine slows all alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import arguments, interleave, ratio, report

CONFIG = Path(__file__).parents[1] / "configs" / "digits" / "resnet.yml"
_BASE = "import torch"


def execute(*words: str) -> None:
    """Run Python to its end."""
    subprocess.run([sys.executable, *words], check=False, capture_output=True)


def until_first_line(*words: str) -> None:
    """Run Python until it has printed a line, and end it."""
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
    assert line, "the run printed nothing"


def programs(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by its description."""
    command = ("-m", "nni_jackpot.cli")
    own = [f"pretrain.cache={folder}", f"output={folder / 'out'}"]
    settings = [word for setting in own for word in ("--set", setting)]
    return {
        _BASE: partial(execute, "-c", _BASE),
        "import nni.compression": partial(execute, "-c", "import nni.compression"),
        "import nni_jackpot": partial(execute, "-c", "import nni_jackpot"),
        "from nni_jackpot import load_ticket": partial(execute, "-c", "from nni_jackpot import load_ticket"),
        "from nni_jackpot import LotteryJackpotPruner": partial(
            execute, "-c", "from nni_jackpot import LotteryJackpotPruner"
        ),
        "nni-jackpot --help": partial(execute, *command, "--help"),
        "nni-jackpot search, a file that is missing": partial(execute, *command, "search", "nowhere.yml"),
        "nni-jackpot search, its first line": partial(
            until_first_line, *command, "search", str(CONFIG), *settings
        ),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="time for all programs")
    args = arguments(parser, "startup")
    with tempfile.TemporaryDirectory() as folder:
        runs = programs(Path(folder))
        if args.smoke:
            runs = {name: run for name, run in runs.items() if name in (_BASE, "nni-jackpot --help")}
        times = interleave(runs, 0 if args.smoke else args.seconds, args.device)
    rows = [
        [name, str(len(own)), f"{median(own):.3g} s", ratio(own, times[_BASE])] for name, own in times.items()
    ]

    def draw(axes: Any) -> None:
        axes.barh([row[0] for row in rows], [median(own) for own in times.values()])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")

    report(args, ["program", "rounds", "time", f"÷ {_BASE}"], rows, draw)


if __name__ == "__main__":
    main()
