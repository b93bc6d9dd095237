"""Sizes and times of tickets: random masks in the shapes of networks, against entropy and other formats.

Norm statistics are noise, the worst case for compression. A time is the median of some runs with the files in
the system's cache; memory is the growth of the peak resident memory.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import arguments, bars, report
from models import MODELS, TARGET_TYPES
from resident import growth
from torch import Tensor, nn

from nni_jackpot import TicketBox, load_ticket, save_sparse, save_ticket
from nni_jackpot.storage.ticket_format import named

MB = 1e6


def _wide(weights: int) -> nn.Module:
    side = int(weights**0.5)
    return nn.Linear(side, side, bias=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: MODELS["resnet50"](224),
    "resnet50, convolutions": lambda: MODELS["resnet50"](224),
    "vgg19": lambda: MODELS["vgg19"](32),
    "vit_b_16": lambda: MODELS["vit_b_16"](224),
    "one of 1e8": lambda: _wide(100_000_000),
    "tiny": lambda: MODELS["tiny"](32),
}


def build(name: str, sparsity: float) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Return a network with random norm statistics, and random masks for its layers."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
        elif buffer_name.endswith("running_var"):
            buffer.exponential_()
    masks = {
        module_name: {"weight": torch.rand_like(module.weight) >= sparsity}
        for module_name, module in model.named_modules()
        if type(module) in (TARGET_TYPES if "convolutions" not in name else (nn.Conv2d,))
    }
    return model, masks


def seconds(run: Callable[[], Any], runs: int) -> float:
    """Return the median time of a run."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)


def zipped(model: nn.Module) -> int:
    """Return the size in bytes of the zipped state dict, including zeros."""
    raw, archive = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), raw)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.pth", raw.getbuffer())
    return archive.tell()


def measure(name: str, sparsity: float, folder: Path, runs: int) -> tuple[list[str], dict[str, float]]:
    """Return the table cells of one network, and its sizes in MB by file format."""
    model, masks = build(name, sparsity)
    path, sparse = folder / "a.ticket", folder / "a.sparse"
    write_memory = growth(lambda: save_ticket(path, masks, model)) / MB
    write = seconds(lambda: save_ticket(path, masks, model), runs)

    def read() -> None:
        load_ticket(path).check_masks()

    read_memory, read_time = growth(read) / MB, seconds(read, runs)
    ticket, size = load_ticket(path), path.stat().st_size
    assert all(torch.equal(mask["weight"], ticket.masks[n]["weight"]) for n, mask in masks.items())
    save_sparse(sparse, model, masks)
    box = TicketBox(model)
    box.add("a", ticket)
    box.add("b", ticket)
    turns = iter(["a", "b"] * runs)
    switch = seconds(lambda: box.use(next(turns)), runs)
    parts, bound = ticket.nbytes, sum(mask.bound for *_, mask in named(ticket.coded))
    weights = sum(mask.size for *_, mask in named(ticket.coded))
    tensors = model.state_dict().values()
    files = {
        "dense": sum(t.numel() * t.element_size() for t in tensors) / MB,
        "zip of zeros": zipped(model) / MB,
        "sparse checkpoint": sparse.stat().st_size / MB,
        "ticket": size / MB,
    }
    cells = [f"{name}, {100 * sparsity:.0f}%", f"{weights / 1e6:.2f} M"]
    cells += [f"{files[file]:.3f}" for file in ("ticket", "sparse checkpoint", "zip of zeros", "dense")]
    cells += [f"{parts['masks']:,}", f"{parts['masks'] / bound:.4f}"]
    cells += [f"{parts['statistics']:,}", f"{size - parts['masks'] - parts['statistics']:,}"]
    cells += [f"{write:.2f} s", f"{read_time:.2f} s", f"{1000 * switch:.0f} ms"]
    cells += [f"{write_memory:.0f} MB", f"{read_memory:.0f} MB"]
    return cells, files


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name in NETWORKS if name != "tiny"]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=names)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--runs", type=int, default=5)
    args = arguments(parser, "ticket")
    if args.smoke:
        args.networks, args.sparsities, args.runs = ["tiny"], [0.9], 1
    rows, sizes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            for sparsity in args.sparsities:
                cells, files = measure(name, sparsity, Path(folder), args.runs)
                rows.append(cells)
                sizes.setdefault(name, files)  # at the first sparsity
                print(*cells, file=sys.stderr, flush=True)

    def draw(axes: Any) -> None:
        series = {file: [files[file] for files in sizes.values()] for file in next(iter(sizes.values()))}
        bars(axes, list(sizes), series)
        axes.set_yscale("log")
        axes.set_ylabel(f"MB, at {100 * args.sparsities[0]:.0f}%")

    header = ["network", "weights", "ticket, MB", "sparse checkpoint, MB", "zip of zeros, MB", "dense, MB"]
    header += ["masks, bytes", "÷ entropy", "statistics, bytes", "all else, bytes"]
    header += ["write", "read, decode", "switch", "memory to write", "to read"]
    report(args, header, rows, draw)


if __name__ == "__main__":
    main()
