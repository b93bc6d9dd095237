"""The script that test_processes.py starts twice by torchrun: searches, with and without interruption, and errors."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

from interruption import stopping

from nni_jackpot.cli import main
from nni_jackpot.experiment.processes import joined


def search(*options: str) -> int:
    """Run the command with options that override the file's."""
    return main(["search", sys.argv[1], *(word for option in options for word in ("--set", option))])


if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent
    # One group for all three commands: PyTorch does not reliably make a second one under torchrun.
    with joined(), mock.patch("nni_jackpot.cli.commands.joined", nullcontext):
        codes = [search(f"output={folder / 'whole'}")]
        resumed = f"output={folder / 'resumed'}", f"pretrain.cache={folder / 'other'}"
        # In the second epoch of training weights; in the search after the third.
        for step in (30, 2 * 23 + 30):
            with suppress(KeyboardInterrupt), stopping(at=step):
                search(*resumed)
        codes += [search(*resumed), search("data.batch_size=63")]
        # Which the first process finds out, and tells the other.
        codes += [search(f"output={folder / 'whole'}", "search.epochs=3")]
    print(f"process {os.environ['RANK']}: {codes}", file=sys.stderr, flush=True)
