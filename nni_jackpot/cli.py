"""The command line: ``nni-jackpot pretrain|search|overlap FILE``, of which search also is an NNI trial."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.config import RunConfig, load_config, parse_override
from nni_jackpot.experiment.overlap import overlap, save
from nni_jackpot.experiment.report import summary
from nni_jackpot.experiment.run import pretrain, search
from nni_jackpot.tracking import tuner_parameters


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 after one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    # NNI logs a line for every metric and every module; the progress bar and the table say the same.
    logging.getLogger("nni").setLevel(logging.WARNING)
    try:
        options.command(options)
    except JackpotError as error:
        print(f"nni-jackpot: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nni-jackpot", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("pretrain", _pretrain, "train the network of FILE, once; later runs find it in the cache"),
        ("search", _search, "find a lottery jackpot in the pre-trained network of FILE"),
        ("overlap", _overlap, "compare the masks of all criteria with the jackpots found from them (Fig. 4)"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("file", metavar="FILE", type=Path, help="YAML file of the run")
        sub.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="put a value in place of the file's, by dotted name: --set search.lr=1.0",
        )
        sub.add_argument(
            "--sweep",
            metavar="KEY=V1,V2,...",
            action="append",
            default=[],
            help="one run a value; searches that differ in the seed alone share a table: --sweep seed=0,1,2",
        )
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    for _, config in _configs(options):
        path, accuracy = pretrain(config)
        print(f"{path}: test accuracy {100 * accuracy:.2f} %")


def _search(options: argparse.Namespace) -> None:
    # All configs are read before the first run: a mistake in the last is known at once.
    by_title: dict[str, list[RunConfig]] = {}
    for swept, config in _configs(options):
        title = ", ".join(f"{key}={_yaml(value)}" for key, value in swept.items() if key != "seed")
        by_title.setdefault(title, []).append(config)
    for title, configs in by_title.items():
        text = summary([search(config) for config in configs])
        print(f"\n{title}\n{text}" if title else f"\n{text}", flush=True)


def _overlap(options: argparse.Namespace) -> None:
    for swept, config in _configs(options):
        title = ", ".join(f"{key}={_yaml(value)}" for key, value in swept.items())
        comparison = overlap(config)
        paths = save(comparison)
        print(f"\n{title}".rstrip(), comparison.table(), comparison.legend(), sep="\n")
        if not any(path.suffix == ".png" for path in paths):
            print('no overlap.png, which needs matplotlib: pip install "nni-jackpot[plot]"')
        print("written to", *paths, flush=True)


def _configs(options: argparse.Namespace) -> list[tuple[dict[str, object], RunConfig]]:
    """Return the swept values and the config of every run that the command line asks for."""
    fixed = dict(parse_override(text) for text in options.set) | tuner_parameters()
    configs = []
    for swept in _sweeps(options.sweep):
        config = load_config(options.file, fixed | swept)
        if swept:  # runs side by side need a folder each
            name = "-".join(f"{key.split('.')[-1]}={_yaml(value)}" for key, value in swept.items())
            config = load_config(options.file, fixed | swept | {"output": str(Path(config.output) / name)})
        configs.append((swept, config))
    return configs


def _sweeps(texts: Sequence[str]) -> Iterator[dict[str, object]]:
    """Iterate over every combination of the swept values; over one empty one if nothing is swept."""
    axes: list[list[tuple[str, object]]] = []
    for text in texts:
        key, value = parse_override(text)
        if isinstance(value, str):
            _, value = parse_override(f"{key}=[{value}]")
        axes.append([(key, v) for v in (value if isinstance(value, list) else [value])])
    for combination in itertools.product(*axes):
        yield dict(combination)


def _yaml(value: object) -> str:
    """Return a value as one writes it: null and true, not None and True."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
