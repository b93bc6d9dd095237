"""Compare the time of a search step between two checkouts of this repository, in turns of a few steps.

Each checkout runs in a separate process; while one takes its turn, the other waits. Ratios are computed from
consecutive turns, so that a temporary slowdown of the machine affects both checkouts alike. Masks are not
compared by held-out losses during the searches (`held_out`).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

_TURN = 4  # steps
_NETWORKS = ("resnet18", "vit")


def work(network: str, turns: int, is_paper: bool) -> None:
    """Search in this process: take a turn per input line, and print the times of all steps at the end."""
    import time

    import nni
    import torch
    import torchvision
    from torch.nn import functional as F

    from nni_jackpot import LotteryJackpotPruner  # isort: skip  # before NNI: patches NNI
    from nni.compression.utils import TorchEvaluator

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if network == "resnet18":
        model, types = torchvision.models.resnet18(num_classes=10), ["Conv2d"]
    else:
        model, types = torchvision.models.VisionTransformer(32, 8, 4, 4, 192, 768, num_classes=10), ["Linear"]
    batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    times: list[float] = []

    def training_step(batch: Any, model: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    def train(model: Any, optimizer: Any, step: Any, scheduler: Any, max_steps: int, max_epochs: Any) -> None:
        model.train()
        for i in range(max_steps):
            if i % _TURN == 0:
                print("ready", flush=True)
                sys.stdin.readline()
            start = time.perf_counter()
            step(batch, model).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), training_step)
    config_list = [
        {"op_types": types, "exclude_op_names": ["heads.head"], "sparse_ratio": 0.9, "global_group_id": 0}
    ]
    given = inspect.signature(LotteryJackpotPruner).parameters
    paper: dict[str, Any] = {"recipe": "paper"}
    if "recipe" not in given:
        from nni_jackpot import EdgePopup

        paper = {"method": EdgePopup.paper()}
    pruner = LotteryJackpotPruner(model, config_list, evaluator, **(paper if is_paper else {}))
    # Checkouts from before the comparison of masks during a search take no held_out.
    options = {"held_out": 0} if "held_out" in inspect.signature(pruner.compress).parameters else {}
    pruner.compress(turns * _TURN, None, **options)
    print(json.dumps(times), flush=True)


class Checkout:
    """A process that runs the code of a checkout."""

    def __init__(self, folder: Path, network: str, turns: int, is_paper: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        line = [sys.executable, str(Path(__file__).resolve()), "--work", network, "--turns", str(turns)]
        line += ["--paper"] if is_paper else []
        self._process = subprocess.Popen(
            line, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.times: list[float] | None = None
        self._wait()

    def take_turn(self) -> None:
        """Take a turn, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a checkout has failed, see above")
        if line.strip() != "ready":
            self.times = json.loads(line)


def compare(old: Path, new: Path, network: str, turns: int, is_paper: bool) -> str:
    """Return a row of the table: step times, and their ratio."""
    checkouts = [Checkout(folder, network, turns, is_paper) for folder in (old, new)]
    while any(checkout.times is None for checkout in checkouts):
        for checkout in checkouts:
            checkout.take_turn()
    before, after = (checkout.times or [] for checkout in checkouts)
    first = turns // 5 * _TURN if turns > 2 else 0  # until memory and caches are warm
    ratios = [sum(after[i : i + _TURN]) / sum(before[i : i + _TURN]) for i in range(first, len(after), _TURN)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    steps = [f"{1000 * median(times[first:]):.4g} ms" for times in (before, after)]
    return f"| {network} | {' | '.join(steps)} | {median(ratios):.3f} ({low:.3f} to {high:.3f}) |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, help="the old checkout, such as from git worktree add")
    parser.add_argument(
        "--new", type=Path, default=Path(__file__).parents[1], help="the new checkout; default: this one"
    )
    parser.add_argument("--turns", type=int, default=50, help=f"number of turns, each of {_TURN} steps")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's recipe, whose settings have not changed",
    )
    parser.add_argument("--work", choices=_NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs, on tiny inputs")
    args = parser.parse_args()
    args.turns = 2 if args.smoke else args.turns
    if args.work:
        work(args.work, args.turns, args.paper)
        return
    if args.old is None:
        parser.error("--old is needed: git worktree add ../old COMMIT")
    print("| network | old step | new step | new ÷ old |\n| --- | --: | --: | --: |")
    for network in _NETWORKS[:1] if args.smoke else _NETWORKS:
        print(compare(args.old.resolve(), args.new.resolve(), network, args.turns, args.paper), flush=True)


if __name__ == "__main__":
    main()
