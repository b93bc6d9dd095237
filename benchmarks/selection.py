"""Time the refresh of a mask against other ways to select the largest scores, for growing numbers of scores.

Between two rounds all scores shrink slightly, as by weight decay, and move by noise. The refresh produces a
mask with ties broken; the alternatives only sort, select the largest scores or find the threshold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from common import arguments, interleave, ratio, report

from nni_jackpot.masking.refresh import kernels
from nni_jackpot.masking.topk import Threshold, update_top, update_tops

COUNTS = [10_000, 100_000, 1_000_000, 10_000_000, 25_500_000, 100_000_000]
SPARSE_RATIO = 0.9
NOISE = 1e-3  # in standard deviations of the scores; about 0.01 % of the mask flips
_OWN = ("refresh", "comparing pass")


class Selection:
    """Moving scores, and the mask that follows them."""

    def __init__(self, count: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.scores = torch.randn(count, device=device)
        self.keep = count - int(SPARSE_RATIO * count)
        self.mask = torch.zeros(count, dtype=torch.bool, device=device)
        self.threshold = Threshold()
        self.flips: list[int] = []
        self._changed = torch.empty(0, dtype=torch.bool)
        self._n_kept = 0
        self._cold_mask = torch.zeros_like(self.mask)
        self._noise = torch.empty_like(self.scores)
        if device.type == "cuda":
            self._changes = torch.empty((2, count), dtype=torch.bool, device=device)
            self._weight, self._values = torch.zeros(2, count, device=device)
        for _ in range(3):  # afterwards the threshold's movement is known
            self.move()
            self.refresh()

    def move(self) -> None:
        """Move the scores as an optimizer step does, and reset the mask of the cold start."""
        is_mask = self._changed.dtype == torch.bool
        self.flips.append(int(self._changed.count_nonzero()) if is_mask else len(self._changed))
        self.scores.mul_(1 - 1e-4).add_(self._noise.normal_(std=NOISE))
        self._cold_mask.zero_()

    def refresh(self) -> None:
        """Refresh the mask as a search on this device does."""
        if self.scores.device.type == "cpu":
            self._changed = update_top(self.scores, self.keep, self.mask, self._n_kept, self.threshold)
        else:
            self._changed = self._update_on_gpu(self.mask, self._changes[0])
        self._n_kept = self.keep

    def first(self) -> None:
        """Compute the mask without a previous mask."""
        if self.scores.device.type == "cpu":
            update_top(self.scores, self.keep, self._cold_mask, 0, Threshold())
        else:
            self._update_on_gpu(self._cold_mask, self._changes[1])

    def _update_on_gpu(self, mask: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        """Update a mask and its masked weights by Triton kernels; without them if there are surplus ties."""
        layer = kernels().Layer(self.scores, self.keep, mask, self._weight, self._values)
        (is_done,) = kernels().update_masks([layer], [changes])
        if not is_done:
            update_tops([(self.scores[None], self.keep, mask[None])])
        return changes

    def runs(self) -> dict[str, Callable[[], Any]]:
        """Return the runs to time alternately."""
        at, above = self.scores.numel() - self.keep, torch.empty_like(self.mask)
        runs: dict[str, Callable[[], Any]] = {
            "refresh": self.refresh,
            "comparing pass": lambda: torch.gt(self.scores, 1.28, out=above),
            "first call": self.first,
            "sort": lambda: self.scores.sort(),
            "topk": lambda: self.scores.topk(self.keep, sorted=False),
            "kthvalue": lambda: self.scores.kthvalue(at + 1),
        }
        if self.scores.device.type == "cpu":
            runs["numpy.partition"] = lambda: numpy.partition(self.scores.numpy(), at)
        return runs


def free_memory(device: torch.device) -> int:
    """Return how many bytes are left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of scores")
    parser.add_argument("--seconds", type=float, default=15, help="time per count; at least four rounds")
    args = arguments(parser, "selection")
    if args.smoke:
        args.counts, args.seconds = [1000, 2000], 0.0
    rows = []
    medians: dict[str, list[float]] = {}
    for count in args.counts:
        if free_memory(args.device) < 80 * count:  # several copies of (value, index) pairs
            print(f"{count} scores: not enough memory, left out", file=sys.stderr)
            continue
        selection = Selection(count, args.device)
        times = interleave(selection.runs(), args.seconds, args.device, selection.move)
        own = times["refresh"]
        flips = median(selection.flips[-len(own) + 1 :])  # the flips of the last round are not recorded
        per_score = f"{1e9 * median(own) / count:.3g} ns"
        row = [f"{count:,}", str(len(own)), f"{1e3 * median(own):.3g} ms", per_score, f"{flips:,.0f}"]
        row.append(ratio(own, times["comparing pass"]))
        rows.append(row + [ratio(values, own) for name, values in times.items() if name not in _OWN])
        print(*rows[-1], file=sys.stderr, flush=True)
        for name, values in times.items():
            medians.setdefault(name, []).append(1000 * median(values))
    counts = [int(row[0].replace(",", "")) for row in rows]

    def draw(axes: Any) -> None:
        for name, values in medians.items():
            axes.loglog(counts, values, marker="o", markersize=3, label=name)
        axes.set_xlabel("scores")
        axes.set_ylabel("ms")
        axes.legend(fontsize=8)

    header = ["scores", "rounds", "refresh", "a score", "flips", "refresh ÷ comparing pass"]
    header += [f"{name} ÷ refresh" for name in medians if name not in _OWN]
    report(args, header, rows, draw)


if __name__ == "__main__":
    main()
