"""Measure the peak memory of a search beyond the dense model, compared with dense training.

Every contestant (see `contestants`) runs in a separate process. The number is the peak of resident memory on
a CPU, and the peak of PyTorch's allocations on a GPU. Bytes per weight count the searched weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch
from common import arguments, bars, report
from contestants import CONTESTANTS, FLOOR, Step
from models import Case, Job, add_options, targets_of
from resident import give_back, reset_peak, resident

CASES = ["vgg19@32:16", "vgg19@32:64", "resnet50@64:64", "resnet50@224:16"]
# Return freed memory to the system at once, so that resident memory equals used memory.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def three_times(step: Step) -> None:
    """Take three steps of a contestant; its optimizer has its state from the second step on."""
    for _ in range(3):
        step()


def growth(case: Case, name: str, args: argparse.Namespace) -> tuple[int, int]:
    """Return the bytes that a contestant takes beyond model and batch, and the number of weights."""
    for tried in (Case("tiny", case.pixels, 2), case):  # a tiny run first loads libraries
        job = Job.of(tried, args)
        n_weights = sum(module.weight.numel() for module in targets_of(job.model))
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            give_back()
            with suppress(OSError):  # if not permitted, the peak while loading NNI may count
                reset_peak()
            before = resident("VmRSS")
        CONTESTANTS[name](job, three_times)
    after = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else resident("VmHWM")
    return after - before, n_weights


def in_own_process(case: Case, name: str, args: argparse.Namespace) -> tuple[int, int]:
    """Return the growth measured in a new process."""
    command = [sys.executable, __file__, "--cases", str(case), "--only", name, "--device", str(args.device)]
    command += ["--amp"] * args.amp + ["--channels-last"] * args.channels_last
    output = subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, stdout=subprocess.PIPE).stdout
    n_bytes, n_weights = json.loads(output.splitlines()[-1])
    return n_bytes, n_weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, CASES)
    parser.add_argument("--only", choices=CONTESTANTS, help="measure only this contestant, in this process")
    args = arguments(parser, "memory")
    if args.only is not None:
        print(json.dumps(growth(args.cases[0], args.only, args)))
        return
    names = list(CONTESTANTS)
    if args.smoke:
        args.cases, names = [Case("tiny", 64, 64)], [FLOOR, "dense training", "paper's recipe"]
    rows = []
    over_floor: dict[str, list[float]] = {name: [] for name in names}
    for case in args.cases:
        here = names[:-1] if args.smoke else []  # a new process takes seconds to load PyTorch and NNI
        found = {n: (growth if n in here else in_own_process)(case, n, args) for n in names}
        floor, dense = found[FLOOR][0], found["dense training"][0]
        for name, (n_bytes, n_weights) in found.items():
            over_floor[name].append((n_bytes - floor) / n_weights)
            row = [
                f"{case}, {name}",
                f"{n_weights:,}",
                f"{n_bytes / 2**20:,.1f} MiB",
                f"{n_bytes / dense:.3g}" if dense else "-",  # too small a case for pages of memory
            ]
            row += [f"{(n_bytes - other) / n_weights:.2f}" for other in (floor, dense)]
            rows.append(row)
            print(*row, file=sys.stderr, flush=True)

    def draw(axes: Any) -> None:
        bars(axes, list(map(str, args.cases)), over_floor)
        axes.set_ylabel("bytes a weight over forward and backward")

    more = [f"bytes a weight over {name}" for name in names[:2]]
    report(args, ["model@pixels:batch", "weights", "peak, MiB", "÷ dense training", *more], rows, draw)


if __name__ == "__main__":
    main()
