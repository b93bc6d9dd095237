"""Measure how time and memory of a search grow with the number of weights.

Each size runs in a separate process: a step of the default recipe, and the forward and backward pass of the
dense network, in turns. The largest network is searched block by block. Networks are linear layers with batch
norm, which compute little for each weight, so that the cost of the search shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from common import arguments, interleave, report
from memory import ENVIRONMENT
from resident import give_back, reset_peak, resident
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.search.blockwise import BlockSearch, search_blocks

SIZES = [100_000, 1_000_000, 10_000_000, 100_000_000]
LARGEST = 1_000_000_000
_LAYERS, _BATCH, _BLOCKS, _BLOCK_STEPS = 4, 64, 64, 4


class Blocks(nn.Module):
    """Blocks of one width, one after another."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last block."""
        for block in self.blocks:
            x = block(x)
        return x


def network(weights: int) -> tuple[nn.Module, int]:
    """Return a network with about ``weights`` weights in its linear layers, and its width."""
    width = round((weights / _LAYERS) ** 0.5)
    layers = [[nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()] for _ in range(_LAYERS)]
    return nn.Sequential(*(module for layer in layers for module in layer)), width


def count(model: nn.Module) -> int:
    """Return the number of weights of linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def memory_now() -> int:
    """Return resident memory, and let the peak start from it."""
    give_back()
    with suppress(OSError):  # if not permitted, the peak of building the network may count
        reset_peak()
    return resident("VmRSS")


def whole(weights: int, seconds: float) -> dict[str, float]:
    """Search a network as a whole."""
    floor, width = network(weights)
    for parameter in floor.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    batch = torch.randn(_BATCH, width)

    def forward_and_backward() -> None:
        floor(batch).square().mean().backward()
        floor.zero_grad()

    interleave({"": forward_and_backward}, 0.0, torch.device("cpu"))
    model, _ = network(weights)
    before = memory_now()
    pruner = LotteryJackpotPruner(
        model, [{"op_types": ["Linear"], "sparse_ratio": 0.9, "global_group_id": 0}]
    )
    search = pruner.begin(total_steps=1_000_000)  # the costly phase, of soft masks, throughout

    def step() -> None:
        model(batch).square().mean().backward()
        search.step()

    interleave({"": step}, 0.0, torch.device("cpu"))
    peak = resident("VmHWM") - before
    times = interleave({"step": step, "floor": forward_and_backward}, seconds, torch.device("cpu"))
    step_seconds = median(times["step"])
    return {
        "weights": count(model),
        "step": step_seconds,
        "ratio": step_seconds / median(times["floor"]),
        "bytes": peak / count(model),
    }


def block_by_block(weights: int) -> dict[str, float]:
    """Search a network block by block; a step is one of a block."""
    width = round((weights / _BLOCKS) ** 0.5)
    model = Blocks(width, _BLOCKS)
    batches = [torch.randn(_BATCH, width) for _ in range(4)]
    before, begin = memory_now(), time.perf_counter()
    settings = BlockSearch(steps=_BLOCK_STEPS, start="wanda")
    names = [f"blocks.{number}" for number in range(_BLOCKS)]
    search_blocks(model, batches, sparse_ratio=0.9, settings=settings, blocks=names)
    seconds = time.perf_counter() - begin
    peak = resident("VmHWM") - before
    return {"weights": count(model), "step": seconds / _BLOCKS / _BLOCK_STEPS, "bytes": peak / count(model)}


def in_own_process(weights: int, args: argparse.Namespace) -> dict[str, float]:
    """Return what a new process measures."""
    command = [sys.executable, __file__, "--only", str(weights), "--seconds", str(args.seconds)]
    command += ["--blocks"] if weights == LARGEST else []
    output = subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[*SIZES, LARGEST], help="numbers of weights")
    parser.add_argument("--seconds", type=float, default=20, help="time for each size")
    parser.add_argument("--only", type=int, help="measure only this size, in this process")
    parser.add_argument("--blocks", action="store_true", help="with --only: block by block")
    args = arguments(parser, "growth")
    if args.only is not None:
        print(json.dumps(block_by_block(args.only) if args.blocks else whole(args.only, args.seconds)))
        return
    if args.smoke:
        found = [whole(1000, 0.0), block_by_block(10_000)]
    else:
        found = [in_own_process(size, args) for size in args.sizes]
    rows = [
        [
            f"{one['weights']:,}",
            "whole" if "ratio" in one else "block by block",
            f"{1000 * one['step']:.4g} ms",
            f"{one['ratio']:.3g}" if "ratio" in one else "-",
            f"{one['bytes']:.1f}",
            f"{one['bytes'] * one['weights'] / 2**20:,.0f} MiB",
        ]
        for one in found
    ]

    def draw(axes: Any) -> None:
        sizes = [one["weights"] for one in found]
        axes.loglog(sizes, [one["step"] for one in found], "o-", label="seconds of a step")
        axes.loglog(
            sizes, [one["bytes"] * one["weights"] / 2**30 for one in found], "s--", label="memory, GiB"
        )
        axes.set_xlabel("searched weights")
        axes.legend(fontsize=8)

    report(
        args, ["weights", "search", "step", "÷ forward and backward", "bytes a weight", "memory"], rows, draw
    )


if __name__ == "__main__":
    main()
