"""The options and the table of methods that the benchmarks of language models share."""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from end_to_end import SEARCHES, end_to_end
from torch import nn

from nni_jackpot import apply_masks
from nni_jackpot.experiment.comparators import SparseGPT
from nni_jackpot.search.blockwise import BlockReport, BlockSearch, blocks_of, search_blocks, targets_of
from nni_jackpot.search.blockwise.polish import Polish, polish
from nni_jackpot.search.match_dense import MatchingLoss

METHODS = ["wanda", "sparsegpt-mask", "sparsegpt", "swaps", "blocks", "polish"]


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of methods; ``defaults`` replace defaults of `BlockSearch` and `Polish`."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pattern", help="such as 2:4")
    kind.add_argument("--ratio", type=float, help="share of zeros in every row")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--test", action="store_true", help="report on test text, not on validation text")
    own = Polish()
    options = {
        **vars(BlockSearch()),
        "polish_steps": own.steps,
        "polish_lr": own.lr,
        "search_lr": 0.001,
        **defaults,
    }
    for name, value in options.items():
        if name != "start":  # the methods name it
            parser.add_argument(f"--{name}", type=type(value), default=value)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options, with pattern 2:4 if there is neither a pattern nor a ratio."""
    args = parser.parse_args()
    if args.pattern is None and args.ratio is None:
        args.pattern = "2:4"
    return args


class Cost:
    """The processor seconds and the peak memory of the process, from now on (Linux)."""

    def __init__(self) -> None:
        self._began = time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def __call__(self, before: float = 0) -> tuple[float, float]:
        """Return the seconds, with ``before`` added, and the peak of resident memory in GiB."""
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        return before + time.process_time() - self._began, int(peak[1]) / 2**20


def print_row(method: str, weights: str, cells: list[str], cost: tuple[float, float] | None = None) -> None:
    """Print the row of a method, with what it costs without the measures."""
    costs = [f"{cost[0]:.0f}", f"{cost[1]:.2f}"] if cost else ["", ""]
    print(f"| {' | '.join([method, weights, *cells, *costs])} |", flush=True)


def print_rows(
    args: argparse.Namespace,
    model: nn.Module,
    batches: list[Any],
    loss: MatchingLoss,
    cells_of: Callable[[nn.Module], list[str]],
) -> None:
    """Find masks by each method, and print its row.

    Parameters
    ----------
    args
        The options of `add_options`.
    model
        The dense network.
    batches
        Calibration data.
    loss
        Loss of the polish.
    cells_of
        Returns the measures of a sparse network.
    """
    chosen: dict[str, Any] = {"sparse_pattern": args.pattern, "sparse_ratio": args.ratio}
    settings = {name: getattr(args, name) for name in vars(BlockSearch()) if name != "start"}
    masks: Mapping[str, Any] = {}
    seconds = 0.0  # of the masks that others start from
    for method in args.methods:
        cost = Cost()
        if method in ("sparsegpt", "sparsegpt-mask"):
            update = method == "sparsegpt"
            targets = targets_of(model, blocks_of(model), args.pattern, args.ratio)
            sparse = SparseGPT(update=update).prune(copy.deepcopy(model), batches, targets)
            weights = "updated" if update else "frozen"
            spent = cost()
            print_row(method, weights, cells_of(sparse), spent)
            continue
        found = masks
        if method == "polish":
            how = Polish(steps=args.polish_steps, lr=args.polish_lr, seed=args.seed)
            found = polish(model, batches, masks, loss, settings=how, on_check=_show_check, **chosen)
        elif method in SEARCHES:
            how = SEARCHES[method](args.search_lr)
            found = end_to_end(model, batches, masks, loss, how, args.pattern, args.polish_steps, args.seed)
        else:
            seconds = 0.0
            own = {} if method == "blocks" else {"steps": 0, "start": method}
            search = BlockSearch(**{**settings, **own})
            found = masks = search_blocks(model, batches, settings=search, on_block=_show_block, **chosen)
        spent = cost(seconds)
        if found is masks:
            seconds = spent[0]
        print_row(method, "frozen", cells_of(apply_masks(copy.deepcopy(model), found)), spent)


def _show_check(step: int, loss: float) -> None:
    print(f"  step {step}: loss {loss:.4f}", flush=True)


def _show_block(report: BlockReport, state: Mapping[str, Any]) -> None:
    print(
        f"  {report.block} ({report.index} of {report.total}): error {report.start_loss:.4f} -> "
        f"{report.loss:.4f}, {report.seconds:.0f} s",
        flush=True,
    )
