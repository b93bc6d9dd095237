"""The command line: ``nni-jackpot pretrain|search|overlap FILE``, of which search also is an NNI trial."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from nni_jackpot.cli.boundary import EXIT_CODES, Exit, way_out
from nni_jackpot.errors import TicketError
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
    parse_file(options.file)


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("pretrain", "train the network of FILE, once; later runs find it in the cache"),
        ("search", "find a lottery jackpot in the pre-trained network of FILE"),
        ("overlap", "compare the masks of all criteria with the jackpots found from them (Fig. 4)"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=f"commands:{name}", check=_check_file)
        sub.add_argument(
            "file", metavar="FILE", type=Path, help="YAML file of a run, or of an NNI experiment"
        )
        sub.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="override a value of the file, by dotted name: --set search.lr=1.0",
        )
        sub.add_argument(
            "--sweep",
            metavar="KEY=V1,V2,...",
            action="append",
            default=[],
            help="one run per value; searches that differ only in the seed share a table: --sweep seed=0,1,2",
        )
        sub.add_argument(
            "--overwrite",
            action="store_true",
            help="replace finished runs, once the new ones are finished",
        )
        if name == "search":
            sub.add_argument(
                "--resume",
                action="store_true",
                help="continue a sweep: reuse the results of finished runs with the same settings",
            )
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="check all runs, and print the plan of each with an estimated time",
            )
    text = "print every key of FILE with its default and meaning"
    sub = commands.add_parser("config", help=text, description=text)
    sub.set_defaults(command="commands:config")
    sub.add_argument("--markdown", action="store_true", help="as the reference page of the documentation")
    _add_ticket_commands(commands)
    text = "write the paper's tables and figures, of finished runs and NNI experiments"
    sub = commands.add_parser("report", help=text, description=text)
    sub.set_defaults(command="commands:report")
    sub.add_argument("runs", metavar="RUNS", type=Path, nargs="+", help="folders of runs or NNI experiments")
    sub.add_argument("-o", "--output", metavar="DIR", type=Path, default="report", help="default: report")
    return parser


def _add_ticket_commands(commands: Any) -> None:
    text = "write the jackpot of a run's folder as a ticket"
    sub = commands.add_parser("export", help=text, description=text)
    sub.set_defaults(command="tickets:export", check=_check_run)
    sub.add_argument("run", metavar="RUN", type=Path, help="folder that a search has written")
    sub.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="jackpot.ticket in the folder by default"
    )
    sub.add_argument(
        "--sparse", action="store_true", help="write a sparse checkpoint, which needs no base: jackpot.sparse"
    )

    text = "print the content of a ticket, its size, and how it was found"
    sub = commands.add_parser("inspect", help=text, description=text)
    sub.set_defaults(command="tickets:inspect", check=_check_ticket)
    sub.add_argument("ticket", metavar="TICKET", type=Path)

    text = "write the sparse network of a ticket and its base"
    sub = commands.add_parser("apply", help=text, description=text)
    sub.set_defaults(command="tickets:apply", check=_check_ticket)
    sub.add_argument("ticket", metavar="TICKET", type=Path)
    text = "state dict, .pth or .safetensors; or a folder of safetensors, as save_pretrained writes it"
    sub.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=text)
    text = "file of either kind; a new folder, if CHECKPOINT is a folder"
    sub.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help=text)
