"""The command line: ``nni-jackpot pretrain|search|overlap FILE``, of which search also is an NNI trial."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import nni_jackpot
from nni_jackpot.cli.boundary import EXIT_CODES, Exit, way_out
from nni_jackpot.cli.options import (
    add_form_options,
    add_loudness_options,
    add_place_options,
    add_run_options,
    check_runs,
)
from nni_jackpot.errors import TicketError
from nni_jackpot.experiment.schema.shipped import config_file
from nni_jackpot.experiment.schema.strict_yaml import parse_file
from nni_jackpot.runtime.terminal import any_terminal, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; unless it is 0, print one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    with any_terminal():
        return int(way_out(partial(_run, options)))


def _run(options: argparse.Namespace) -> None:
    """Check the named file, then import the command: PyTorch and NNI take seconds to import."""
    options.check(options)
    run_command = resolve_name("nni_jackpot.cli.commands:run_command")
    run_command(resolve_name(f"nni_jackpot.cli.{options.command}"), options)


def _check_file(options: argparse.Namespace) -> None:
    check_runs(options)
    if options.file is not None:
        parse_file(config_file(options.file))


def _check_run(options: argparse.Namespace) -> None:
    parse_file(options.run / "config.yml")


def _check_ticket(options: argparse.Namespace) -> None:
    if not options.ticket.exists():
        raise TicketError(f"there is no jackpot ticket {options.ticket}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.REFUSED, f"{self.prog}: error: {one_line(message)}; see {self.prog} -h\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nni-jackpot",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(check=lambda options: None)
    parser.add_argument("--version", action="version", version=f"nni-jackpot {nni_jackpot.__version__}")
    add_loudness_options(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("pretrain", "train the network of FILE, once; later runs find it in the cache"),
        ("search", "find a lottery jackpot in the pre-trained network of FILE"),
        ("overlap", "compare the masks of all criteria with the jackpots found from them (Fig. 4)"),
    ):
        sub = _command(commands, name, text, f"commands:{name}", check=_check_file)
        add_run_options(sub, is_search=name == "search")
    sub = _command(
        commands, "config", "print every key of FILE with its default and meaning", "commands:config"
    )
    sub.add_argument("--markdown", action="store_true", help="as the reference page of the documentation")
    text = "image_folder, digits, causal_lm or channels: print a file to begin with"
    sub.add_argument("--template", metavar="NAME", help=text)
    text = "print the names of the configs and examples that come with the package, or the path of one"
    sub = _command(commands, "examples", text, "commands:examples")
    sub.add_argument("name", metavar="NAME", nargs="?", help="such as digits/resnet or quickstart")
    _add_ticket_commands(commands)
    text = "measure a jackpot and its dense network on the test data of its run"
    add_place_options(_command(commands, "evaluate", text, "deployment:evaluate"))
    text = "write a jackpot in a form that is smaller or faster, and check and measure what was written"
    sub = _command(commands, "deploy", text, "deployment:deploy")
    add_place_options(sub)
    add_form_options(sub)
    text = "write the paper's tables and figures, of finished runs and NNI experiments"
    sub = _command(commands, "report", text, "commands:report")
    sub.add_argument("runs", metavar="RUNS", type=Path, nargs="+", help="folders of runs or NNI experiments")
    sub.add_argument("-o", "--output", metavar="DIR", type=Path, default="report", help="default: report")
    text = "print versions, hardware, repairs of NNI, and how to install what is missing"
    _command(commands, "doctor", text, "doctor:doctor")
    return parser


def _command(commands: Any, name: str, text: str, function: str, **defaults: Any) -> argparse.ArgumentParser:
    """Add a command; ``function`` is where its code is, within this package."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(command=function, **defaults)
    return sub


def _add_ticket_commands(commands: Any) -> None:
    text = "write the jackpot of a run's folder as a ticket"
    sub = _command(commands, "export", text, "tickets:export", check=_check_run)
    sub.add_argument("run", metavar="RUN", type=Path, help="folder that a search has written")
    sub.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="jackpot.ticket in the folder by default"
    )
    sub.add_argument(
        "--sparse", action="store_true", help="write a sparse checkpoint, which needs no base: jackpot.sparse"
    )

    text = "print the content of a ticket, its size, and how it was found"
    sub = _command(commands, "inspect", text, "tickets:inspect", check=_check_ticket)
    sub.add_argument("ticket", metavar="TICKET", type=Path)

    text = "write the sparse network of a ticket and its base"
    sub = _command(commands, "apply", text, "tickets:apply", check=_check_ticket)
    sub.add_argument("ticket", metavar="TICKET", type=Path)
    text = "state dict, .pth or .safetensors; or a folder of safetensors, as save_pretrained writes it"
    sub.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=text)
    text = "file of either kind; a new folder, if CHECKPOINT is a folder"
    sub.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help=text)
