"""Time global ranking over all layers (``global_group_id``) against NNI's implementation.

NNI ranks by a heap in Python and takes more than a minute for VGG-19's 20 million weights, so it runs once,
between two halves of our runs. The masks may differ only for magnitudes equal to the threshold.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import arguments, bars, interleave, report
from models import Case, targets_of
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner  # isort: skip  # before NNI's pruners: patches NNI
from nni.compression.pruning import LevelPruner

from nni_jackpot.masking.budgets import Unit, by_global_rank
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masking.topk import keep_top

Masks = dict[str, Tensor]


def ranking(weights: dict[str, Tensor], sparse_ratio: float) -> Masks:
    """Rank all weights, distribute the zeros and build the masks, as LotteryJackpotPruner does first."""
    importance = CRITERIA["magnitude"](weights)
    units = {name: Unit(weight.numel(), 1, sparse_ratio) for name, weight in weights.items()}
    budgets = by_global_rank(units, importance)
    return {name: keep_top(importance[name], keep) for name, keep in budgets.items()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of a single run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def different_ties(weights: dict[str, Tensor], ours: Masks, theirs: Masks) -> int:
    """Return the number of elements in which masks differ; any difference that is not a tie is an error."""
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    kept, expected = (torch.cat([mask[name].flatten().bool() for name in weights]) for mask in (ours, theirs))
    differing = magnitudes[kept != expected]
    if (differing != magnitudes[kept].min()).any():
        raise SystemExit("the masks differ, and not only in ties")
    return len(differing)


def masks_by_pruner(model: nn.Module, config_list: list[dict[str, Any]]) -> Masks:
    """Return the pruner's initial masks, and restore the model."""
    pruner = LotteryJackpotPruner(model, config_list)
    masks = {name: of_module["weight"] for name, of_module in pruner.get_masks().items()}
    pruner.unwrap_model()
    return masks


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", type=Case.parse, default=Case("vgg19", 32, 1), help="the batch size is ignored"
    )
    parser.add_argument("--sparse-ratio", type=float, default=0.9)
    parser.add_argument(
        "--seconds", type=float, default=5, help="time for our runs, before and after NNI's run"
    )
    args = arguments(parser, "ranking")
    if args.smoke:
        args.case, args.seconds, args.sparse_ratio = Case("tiny", 8, 1), 0.0, 0.5
    model = args.case.build().to(args.device)
    searched = set(targets_of(model))
    weights = {name: module.weight for name, module in model.named_modules() if module in searched}
    entry = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": args.sparse_ratio, "global_group_id": 0}
    runs = {
        "ranking": lambda: ranking(weights, args.sparse_ratio),
        "pruner": lambda: masks_by_pruner(model, [entry]),
    }
    ours = interleave(runs, args.seconds, args.device)
    copied = copy.deepcopy(model)
    making, pruner = timed(lambda: LevelPruner(copied, [entry]))
    theirs, found = timed(pruner.generate_masks)
    taking, _ = timed(lambda: (pruner.update_masks(found), pruner.get_masks()))
    for name, times in interleave(runs, args.seconds, args.device).items():
        ours[name] += times

    expected = {name: masks["weight"] for name, masks in found.items()}
    masks, by_pruner = runs["ranking"](), runs["pruner"]()
    if not all(torch.equal(mask, by_pruner[name].bool()) for name, mask in masks.items()):
        raise SystemExit("the pruner's masks are others")
    n_ties = different_ties(weights, masks, expected)
    n_weights = sum(weight.numel() for weight in weights.values())
    rows: list[list[str]] = []
    seconds: dict[str, list[float]] = {"NNI": [], "nni-jackpot": []}
    for name, times, other in [
        ("ranking and masks", ours["ranking"], theirs),
        ("from a model to its masks", ours["pruner"], making + theirs + taking),
    ]:
        own = median(times)
        row = [name, f"{n_weights:,}", f"{other:.3g} s", f"{1000 * own:.4g} ms", f"{other / own:.4g}"]
        rows.append([*row, f"{n_ties}"])
        seconds["NNI"].append(other)
        seconds["nni-jackpot"].append(own)

    def draw(axes: Any) -> None:
        bars(axes, [row[0] for row in rows], seconds)
        axes.set_yscale("log")
        axes.set_ylabel("seconds")

    header = ["time of", "weights", "NNI", "nni-jackpot", "NNI ÷ nni-jackpot", "ties decided otherwise"]
    report(args, header, rows, draw)


if __name__ == "__main__":
    main()
