"""Times a search step against what it cannot do without, against dense training, and against other ways.

All take turns in one process, each with its own copy of the model and the same batch; see `contestants`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from common import arguments, bars, interleave, ratio, report
from contestants import CONTESTANTS, Step, Use
from models import Case, Job, add_options

CASES = ["vgg19@32:16", "vgg19@32:64", "resnet50@224:16", "resnet50@64:64", "vit_b_16@224:4"]


def all_at_once(
    contestants: Sequence[Callable[[Job, Use], None]],
    job: Job,
    use: Callable[[list[Step]], None],
    steps: Sequence[Step] = (),
) -> None:
    """Enter the training loops of all contestants, one within the other, and use all their steps."""
    if len(steps) == len(contestants):
        use(list(steps))
        return
    own = replace(job, model=copy.deepcopy(job.model))
    contestants[len(steps)](own, lambda step: all_at_once(contestants, job, use, [*steps, step]))


def measure(case: Case, names: Sequence[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the times of every contestant's steps."""
    times: dict[str, list[float]] = {}

    def use(steps: list[Step]) -> None:
        times.update(interleave(dict(zip(names, steps, strict=True)), args.seconds, args.device))

    all_at_once([CONTESTANTS[name] for name in names], Job.of(case, args), use)
    gc.collect()  # wrapped models are in cycles
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, CASES)
    parser.add_argument("--seconds", type=float, default=75, help="for each case; four rounds at least")
    parser.add_argument(
        "--against",
        choices=CONTESTANTS,
        nargs="*",
        default=list(CONTESTANTS),
        help="what takes turns with it",
    )
    args = arguments(parser, "step")
    if args.smoke:
        args.cases, args.seconds = [Case("tiny", 8, 2)], 0.0
    # NNI's pruner fails on weights in that layout: "view size is not compatible".
    names = [n for n in CONTESTANTS if not (args.channels_last and n == "NNI's MovementPruner")]
    names = [n for n in names if n in (*args.against, "forward and backward", "search")]
    rows = []
    relative: dict[str, list[float]] = {name: [] for name in names}
    for case in args.cases:
        times = measure(case, names, args)
        own = times.pop("search")
        ratios = [ratio(own, others) for others in times.values()]
        rows.append([str(case), str(len(own)), f"{1000 * median(own):.4g} ms", *ratios])
        print(*rows[-1], file=sys.stderr, flush=True)
        for name, values in [*times.items(), ("search", own)]:
            relative[name].append(median(values) / median(times["forward and backward"]))
    others = [f"÷ {name}" for name in names if name != "search"]

    def draw(axes: Any) -> None:
        bars(axes, [row[0] for row in rows], relative)
        axes.set_ylabel("time of a step ÷ forward and backward")

    report(args, ["model@pixels:batch", "rounds", "search step", *others], rows, draw)


if __name__ == "__main__":
    main()
