"""Time a search step against its forward and backward alone, dense training, and other searches.

All contestants alternate in one process, each with a copy of the model and the same batch; see `contestants`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from common import arguments, bars, interleave, ratio, report
from contestants import CONTESTANTS, Step, Use
from models import Case, Job, add_options

# Constants of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_FLOOR = "forward and backward"
# Contestants with similar times, which need many rounds to be distinguished.
_CLOSE = (_FLOOR, "dense training", "recipe jackpot", "search")

CASES = ["vgg19@32:16", "vgg19@32:64", "resnet50@224:16", "resnet50@64:64", "vit_b_16@224:4"]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as other allocators do.

    Otherwise it returns large blocks to the system and maps them page by page in the next step, for some
    contestants and not for others, depending on the position of the blocks.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def all_at_once(
    contestants: Sequence[Callable[[Job, Use], None]],
    job: Job,
    use: Callable[[list[Step]], None],
    steps: Sequence[Step] = (),
) -> None:
    """Enter the training loops of all contestants, nested, and use all their steps."""
    if len(steps) == len(contestants):
        use(list(steps))
        return
    own = replace(job, model=copy.deepcopy(job.model))
    contestants[len(steps)](own, lambda step: all_at_once(contestants, job, use, [*steps, step]))


Times = dict[str, list[float]]


def measure(case: Case, names: Sequence[str], args: argparse.Namespace) -> tuple[Times, Times]:
    """Return the step times of the close contestants, and of the other contestants with the search."""
    found: list[Times] = []

    def use(steps: list[Step]) -> None:
        every = dict(zip(names, steps, strict=True))
        for group in (_CLOSE, {*every}.difference(_CLOSE) | {"search"}):
            runs = {name: step for name, step in every.items() if name in group}
            found.append(interleave(runs, args.seconds / 2, args.device) if len(runs) > 1 else {})

    all_at_once([CONTESTANTS[name] for name in names], Job.of(case, args), use)
    gc.collect()  # wrapped models contain reference cycles
    close, others = found
    return close, others


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, CASES)
    parser.add_argument(
        "--seconds", type=float, default=75, help="time per case; half of it for close contestants"
    )
    parser.add_argument(
        "--against",
        choices=CONTESTANTS,
        nargs="*",
        default=list(CONTESTANTS),
        help="the contestants to compare with",
    )
    args = arguments(parser, "step")
    keep_freed_memory()
    if args.smoke:
        args.cases, args.seconds = [Case("tiny", 8, 2)], 0.0
    # NNI's pruner fails on weights in that layout: "view size is not compatible".
    names = [n for n in CONTESTANTS if not (args.channels_last and n == "NNI's MovementPruner")]
    names = [n for n in names if n in (*args.against, _FLOOR, "search")]
    rows = []
    relative: dict[str, list[float]] = {name: [] for name in names}
    for case in args.cases:
        close, others = measure(case, names, args)
        own, floor = close["search"], median(close[_FLOOR])
        rounds = ", ".join(str(len(times["search"])) for times in (close, others) if times)
        row = [str(case), rounds, f"{1000 * median(own):.4g} ms"]
        for name in names:
            beside = close if name in close else others
            relative[name].append(median(beside[name]) / median(beside["search"]) * median(own) / floor)
            if name != "search":
                row.append(ratio(beside["search"], beside[name]))
        rows.append(row)
        print(*row, file=sys.stderr, flush=True)

    def draw(axes: Any) -> None:
        bars(axes, [row[0] for row in rows], relative)
        axes.set_ylabel("time of a step ÷ forward and backward")

    columns = [f"÷ {name}" for name in names if name != "search"]
    report(args, ["model@pixels:batch", "rounds", "search step", *columns], rows, draw)


if __name__ == "__main__":
    main()
