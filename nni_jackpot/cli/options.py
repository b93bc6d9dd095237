"""Options of the commands; nothing here imports PyTorch or NNI, which take seconds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nni_jackpot.errors import ExperimentConfigError

# What stands for a file: a search from options of the command line alone.
OPTIONS = {
    "model": "network: torchvision/NAME, timm/NAME, transformers/FOLDER, resnet or vgg19",
    "weights": "published weights of the network",
    "checkpoint": "file or folder of weights of your own",
    "data": "folder with train/CLASS/ and val/CLASS/, name of a data set, module:function, or folder of text",
    "preset": "what to prune: weights, mobile, 2:4 or channels; default: weights",
    "sparsity": "share of zeros, by default 0.9",
    "epochs": "passes over the training data, by default 3",
    "output": "folder that the run writes, by default in runs",
}
_KINDS: dict[str, type] = {"sparsity": float, "epochs": int}
_FILE = "YAML file of a run or of an NNI experiment, or the name of a shipped one: digits/resnet"


def add_run_options(parser: argparse.ArgumentParser, is_search: bool) -> None:
    """Add what names and changes the runs of a command."""
    nargs = "?" if is_search else None
    parser.add_argument("file", metavar="FILE", type=Path, help=_FILE, nargs=nargs)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a value of the file, by dotted name: --set search.lr=1.0",
    )
    parser.add_argument(
        "--sweep",
        metavar="KEY=V1,V2,...",
        action="append",
        default=[],
        help="one run per value; searches that differ only in the seed share a table: --sweep seed=0,1,2",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace finished runs, once the new ones are finished",
    )
    if is_search:
        group = parser.add_argument_group("without FILE")
        for name, text in OPTIONS.items():
            group.add_argument(f"--{name}", metavar=name.upper(), type=_KINDS.get(name, str), help=text)
        parser.add_argument(
            "--print-config",
            action="store_true",
            help="print the YAML file that the command stands for, and search nothing",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="continue a sweep: reuse the results of finished runs with the same settings",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check all runs, and print the plan of each with an estimated time",
        )


def check_runs(options: argparse.Namespace) -> None:
    """Raise ExperimentConfigError if there are both a file and what stands for one, or neither."""
    given = [f"--{name}" for name in OPTIONS if getattr(options, name, None) is not None]
    if options.file is not None and given:
        wanted = "one of them; --set KEY=VALUE overrides a value of the file"
        raise ExperimentConfigError(f"found FILE and {', '.join(given)}, allowed: {wanted}")
    if options.file is None and (options.model is None or options.data is None):
        found = ", ".join(given) or "nothing"
        raise ExperimentConfigError(f"found {found}, allowed: FILE, or at least --model and --data")


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a finished run or a ticket."""
    parser.add_argument(
        "place", metavar="RUN|TICKET", type=Path, help="folder of a finished run, or a ticket"
    )
    text = "YAML file of a ticket's run; config.yml beside the ticket by default"
    parser.add_argument("--config", metavar="FILE", type=Path, help=text)
    text = "override a value of the run's config: --set device=cpu --set data.root=FOLDER"
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    text = "module to import, from this folder or where Python looks for modules"
    parser.add_argument("--plugin", metavar="MODULE", action="append", default=[], help=text)


def add_form_options(parser: argparse.ArgumentParser) -> None:
    """Add what says in which form a jackpot is written."""
    text = "onnx, int8, shrink, csr, 2:4, hf, or the name that a plugin registers"
    parser.add_argument("--form", metavar="FORM", required=True, help=text)
    text = "file or, for hf, new folder; by default in the folder deployed beside the jackpot"
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help=text)
    text = "samples that outputs are compared and latency is measured on; default: 8"
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=8, help=text)


def add_loudness_options(parser: argparse.ArgumentParser) -> None:
    """Add how much the commands print."""
    loudness: Any = parser.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q", "--quiet", action="store_true", help="print warnings and errors only, on stderr"
    )
    loudness.add_argument("-v", "--verbose", action="store_true", help="print what NNI logs as well")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"found {text}, allowed: a whole number from 1")
    return int(text)
