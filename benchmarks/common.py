"""Shared parts of the benchmarks: options, interleaved timing, the machine's name, tables and plots."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def arguments(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the command line, and check everything that the report needs before the benchmark starts."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--save", type=Path, nargs="?", const=PAGE, help=f"write into a page, {PAGE.name}")
    parser.add_argument("--smoke", action="store_true", help="only check that it runs, on tiny inputs")
    args = parser.parse_args()
    args.name = name if args.device.type == "cpu" else f"{name}-{args.device.type}"
    if args.save is not None:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--save draws a plot: pip install '.[plot]'")
        if any(_marker(args.name, end) not in args.save.read_text(encoding="utf-8") for end in _ENDS):
            parser.error(f"{args.save} has no place for {args.name}")
    return args


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float,
    device: torch.device,
    before_round: Callable[[], Any] = lambda: None,
    least: int = 4,
) -> dict[str, list[float]]:
    """Time runs alternately (a, b, a, b, ...) until the time is up, and return the seconds per round.

    A temporary slowdown of the machine affects all runs alike. The first fifth of the rounds is dropped.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begin < seconds:
        before_round()
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: values[-(-rounds // 5) :] for name, values in times.items()}


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Return the ratio of two medians, with the quartiles of the ratios per round in brackets."""
    low, _, high = quantiles([x / y for x, y in zip(a, b, strict=True)], n=4, method="inclusive")
    return f"{median(a) / median(b):.3g} ({low:.3g} to {high:.3g})"


def machine(device: torch.device) -> str:
    """Describe the hardware and software that the numbers depend on."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        threads = torch.get_num_threads()
        hardware = f"{models[0] if models else platform.processor()}, {threads} thread{'s' * (threads > 1)}"
    return f"{hardware}, PyTorch {torch.__version__}"


_ENDS = ("begin", "end")


def _marker(name: str, end: str) -> str:
    return f"<!-- {name}:{end} -->"


def report(
    args: argparse.Namespace,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    draw: Callable[[Any], None],
) -> None:
    """Print a table as Markdown; with ``--save`` also write it into the page, with a plot."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = f"```bash\n{command}\n```\n\n{machine(args.device)}:\n\n{table}\n"
    print(text)
    if args.save is None:
        return
    import matplotlib
    from matplotlib.figure import Figure

    plot = args.save.parent / args.save.stem / f"{args.name}.svg"
    plot.parent.mkdir(exist_ok=True)
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": args.name}):  # small, always the same
        draw(figure.subplots())
        figure.savefig(plot, format="svg", metadata={"Date": None})
    begin, end = (_marker(args.name, which) for which in _ENDS)
    page = args.save.read_text(encoding="utf-8")
    before, after = page.split(begin)[0], page.split(end)[1]
    image = f"![{args.name}]({plot.relative_to(args.save.parent)})"
    args.save.write_text(f"{before}{begin}\n{text}\n{image}\n{end}{after}", encoding="utf-8")


def bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw a group of bars per case, with one labelled bar per series."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = [group + width * (i - (len(series) - 1) / 2) for group in range(len(groups))]
        drawn = axes.bar(places, values, width, label=label)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(fontsize=8)
