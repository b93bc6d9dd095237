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
from contestants import CONTESTANTS, FLOOR, Step, Use
from models import Case, Job, add_options

# Constants of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Contestants that take a multiple of the others' time, which need fewer rounds.
_SLOW = ("plain edge-popup", "NNI's MovementPruner")

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


def measure(case: Case, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Return the step times of all contestants, in two groups that each contain the lower bound."""
    found: list[dict[str, list[float]]] = []

    def use(steps: list[Step]) -> None:
        every = dict(zip(names, steps, strict=True))
        slow = {name: step for name, step in every.items() if name in (FLOOR, *_SLOW)}
        close = {name: step for name, step in every.items() if name not in _SLOW}
        for runs in (close, slow):
            found.append(interleave(runs, args.seconds / 2, args.device) if len(runs) > 1 else {})

    all_at_once([CONTESTANTS[name] for name in names], Job.of(case, args), use)
    gc.collect()  # wrapped models contain reference cycles
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, CASES)
    parser.add_argument(
        "--seconds", type=float, default=75, help="time per case; half of it for close contestants"
    )
    parser.add_argument(
        "--contestants",
        choices=CONTESTANTS,
        nargs="*",
        default=list(CONTESTANTS),
        help="the contestants to compare with the lower bound",
    )
    args = arguments(parser, "step")
    keep_freed_memory()
    if args.smoke:
        args.cases, args.seconds = [Case("tiny", 8, 2)], 0.0
    # NNI's pruner fails on weights in that layout: "view size is not compatible".
    names = [n for n in CONTESTANTS if not (args.channels_last and n == "NNI's MovementPruner")]
    names = [n for n in names if n in (*args.contestants, FLOOR)]
    rows = []
    relative: dict[str, list[float]] = {name: [] for name in names if name != FLOOR}
    for case in args.cases:
        for group in measure(case, names, args):
            for name, times in group.items():
                if name == FLOOR:
                    continue
                relative[name].append(median(times) / median(group[FLOOR]))
                step = f"{1000 * median(times):.4g} ms"
                rows.append([str(case), name, str(len(times)), step, ratio(times, group[FLOOR])])
                print(*rows[-1], file=sys.stderr, flush=True)

    def draw(axes: Any) -> None:
        bars(axes, list(map(str, args.cases)), relative)
        axes.set_ylabel("time of a step ÷ forward and backward")

    report(args, ["model@pixels:batch", "contestant", "rounds", "step", f"÷ {FLOOR}"], rows, draw)


if __name__ == "__main__":
    main()
