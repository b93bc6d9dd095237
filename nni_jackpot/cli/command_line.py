"""The command line: ``nni-jackpot pretrain|search|overlap FILE``, of which search also is an NNI trial."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nni_jackpot.cli.boundary import EXIT_CODES, Exit, way_out
from nni_jackpot.cli.one_line import PLACE, add_options, content_of
from nni_jackpot.cli.tickets import add_commands
from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, parse_override, to_dict
from nni_jackpot.experiment.dry_run import plan
from nni_jackpot.experiment.folder.result import finished
from nni_jackpot.experiment.overlap import overlap, save
from nni_jackpot.experiment.processes import joined
from nni_jackpot.experiment.reference.keys import markdown, yaml_text
from nni_jackpot.experiment.reference.templates import TEMPLATES, commented
from nni_jackpot.experiment.report import summary, write_report
from nni_jackpot.experiment.run import pretrain, search
from nni_jackpot.experiment.schema import strict_yaml
from nni_jackpot.experiment.schema.rules import overridden
from nni_jackpot.experiment.sweep import named, runs_of
from nni_jackpot.experiment.tracking import Interrupted, tuner_parameters
from nni_jackpot.runtime.distributed import broadcast_result, rank
from nni_jackpot.runtime.terminal import any_terminal, one_line

Value = TypeVar("Value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; unless it is 0, print one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    # NNI logs a line per metric and per module; progress and table have the same information.
    logging.getLogger("nni").setLevel(logging.WARNING)

    def command() -> None:
        with joined(), redirect_stdout(sys.stdout if rank() == 0 else None):
            options.command(options)

    with any_terminal():
        return int(way_out(command))


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("pretrain", _pretrain, "train the network of FILE, once; later runs find it in the cache"),
        ("search", _search, "find a lottery jackpot in the pre-trained network of FILE"),
        ("overlap", _overlap, "compare the masks of all criteria with the jackpots found from them (Fig. 4)"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        text = "YAML file of a run, or of an NNI experiment"
        sub.add_argument(
            "file", metavar="FILE", type=Path, help=text, nargs="?" if command is _search else None
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
        if command is _search:
            add_options(sub)
            sub.add_argument(
                "--print-config",
                action="store_true",
                help="print the YAML file that the command stands for, and search nothing",
            )
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
    sub.set_defaults(command=_config)
    sub.add_argument("--markdown", action="store_true", help="as the reference page of the documentation")
    sub.add_argument("--template", choices=TEMPLATES, help="a file to begin with")
    add_commands(commands)
    text = "write the paper's tables and figures, of finished runs and NNI experiments"
    sub = commands.add_parser("report", help=text, description=text)
    sub.set_defaults(command=_report)
    sub.add_argument("runs", metavar="RUNS", type=Path, nargs="+", help="folders of runs or NNI experiments")
    sub.add_argument("-o", "--output", metavar="DIR", type=Path, default="report", help="default: report")
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    for _, config in _configs(options):
        path, accuracy = pretrain(config, options.overwrite)
        if path is None:
            print(f"{config.model.name} has its weights: nothing is trained")
        else:
            print(f"{path}: test accuracy {100 * accuracy:.2f} %")


def _config(options: argparse.Namespace) -> None:
    if options.template is not None:
        print(commented(TEMPLATES[options.template]), end="")
    else:
        print((markdown if options.markdown else yaml_text)(), end="")


def _search(options: argparse.Namespace) -> None:
    if options.print_config:
        _print_config(options)
        return
    if options.dry_run:
        print(plan(_configs(options), here=True, overwrite=options.overwrite))
        return
    # All configs are read before the first run, so that an error in the last one is reported at once.
    runs = _configs(options)
    by_title: dict[str, list[tuple[str, RunConfig]]] = {}
    for swept, config in runs:
        title = named({key: value for key, value in swept.items() if key != "seed"})
        by_title.setdefault(title, []).append((named(swept), config))
    number = 0
    try:
        for title, own in by_title.items():
            found = []
            for name, config in own:
                number += 1
                if len(runs) > 1:
                    print(f"run {number} of {len(runs)}: {name}", flush=True)
                done = options.resume and broadcast_result(partial(finished, config))
                found.append(done or search(config, options.overwrite))
            text = summary(found, own[0][1].search.named_init)
            print(f"\n{title}\n{text}" if title else f"\n{text}", flush=True)
    except KeyboardInterrupt as stop:
        if len(runs) == 1:
            raise
        where = f"{stop}, " if isinstance(stop, Interrupted) else ""
        raise Interrupted(f"{where}in run {number} of {len(runs)}") from stop


def _print_config(options: argparse.Namespace) -> None:
    """Print the YAML of the command: that of its options, or every value that the file stands for."""
    runs = _configs(options)
    if len(runs) > 1:
        raise ExperimentConfigError("--print-config: found a sweep, allowed: one run")
    content: Any = content_of(options) or to_dict(runs[0][1])
    for name, value in map(parse_override, options.set):
        content = overridden(content, name.split("."), value, name)
    print(strict_yaml.dump(content), end="")


def _overlap(options: argparse.Namespace) -> None:
    for swept, config in _configs(options):
        title = named(swept)
        comparison = overlap(config, options.overwrite)
        paths = save(comparison) if rank() == 0 else []
        print(f"\n{title}".rstrip(), comparison.table(), comparison.legend(), sep="\n")
        if not any(path.suffix == ".png" for path in paths):
            print('no overlap.png, which needs matplotlib: pip install "nni-jackpot[plot]"')
        print("written to", *paths, flush=True)


def _report(options: argparse.Namespace) -> None:
    print(write_report(options.runs, options.output))


def _configs(options: argparse.Namespace) -> list[tuple[dict[str, object], RunConfig]]:
    """Return the swept values and the config of every run of the command line."""
    fixed = _once("--set", map(parse_override, options.set)) | broadcast_result(tuner_parameters)
    given = content_of(options) if hasattr(options, "model") else None
    path = options.file if given is None else Path(PLACE)
    return runs_of(path, fixed, _once("--sweep", map(_axis, options.sweep)), given)


def _once(option: str, pairs: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Return values by dotted name; a name that is given twice is an error."""
    values: dict[str, Value] = {}
    for key, value in pairs:
        if key in values:
            raise ExperimentConfigError(f"{option} {key} is given twice, allowed: once")
        values[key] = value
    return values


def _axis(text: str) -> tuple[str, list[object]]:
    """Split ``seed=0,1,2`` into the dotted name and its values."""
    key, value = parse_override(text)
    if isinstance(value, str):
        _, value = parse_override(f"{key}=[{value}]")
    if value == []:
        raise ExperimentConfigError(f"--sweep {key}: found no values, allowed: {key}=V1,V2,...")
    return key, value if isinstance(value, list) else [value]
