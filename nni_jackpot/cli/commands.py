"""The commands about runs: ``nni-jackpot pretrain|search|overlap FILE``, ``config`` and ``report``.

What needs NNI is imported where it is used, after the configs have been read: an error in a file is reported
without that wait.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nni_jackpot.cli.one_line import PLACE, content_of
from nni_jackpot.errors import ExperimentConfigError, Interrupted
from nni_jackpot.experiment.config import RunConfig, parse_override, to_dict
from nni_jackpot.experiment.processes import joined
from nni_jackpot.experiment.schema import strict_yaml
from nni_jackpot.experiment.schema.rules import overridden
from nni_jackpot.experiment.schema.shipped import config_file, shipped_files
from nni_jackpot.experiment.sweep import named, runs_of
from nni_jackpot.runtime.distributed import broadcast_result, rank
from nni_jackpot.runtime.extras import install_command
from nni_jackpot.runtime.registry import close_match

Value = TypeVar("Value")


def run_command(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run a command in all processes that torchrun has started; only the first prints."""
    _set_loudness(options)
    with joined(), redirect_stdout(sys.stdout if rank() == 0 and not options.quiet else None):
        command(options)


def pretrain(options: argparse.Namespace) -> None:
    """Train the networks of a file."""
    runs = _configs(options)
    _load_nni(options, len(runs))
    from nni_jackpot.experiment import run

    for _, config in runs:
        path, accuracy = run.pretrain(config, options.overwrite)
        if path is None:
            print(f"{config.model.name} has its weights: nothing is trained")
        else:
            print(f"{path}: test accuracy {100 * accuracy:.2f} %")


def search(options: argparse.Namespace) -> None:
    """Find the jackpots of a file, or print the plan of the runs."""
    if options.print_config:
        _print_config(options)
        return
    # All configs are read before the first run, so that an error in the last one is reported at once.
    runs = _configs(options)
    _load_nni(options, len(runs))
    if options.dry_run:
        from nni_jackpot.experiment.dry_run import plan

        print(plan(runs, here=True, overwrite=options.overwrite))
        return
    from nni_jackpot.experiment import run
    from nni_jackpot.experiment.folder.result import finished
    from nni_jackpot.experiment.report.screen import summary

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
                found.append(done or run.search(config, options.overwrite))
            text = summary(found, own[0][1].search.named_init)
            print(f"\n{title}\n{text}" if title else f"\n{text}", flush=True)
    except KeyboardInterrupt as stop:
        if len(runs) == 1:
            raise
        where = f"{stop}, " if isinstance(stop, Interrupted) else ""
        raise Interrupted(f"{where}in run {number} of {len(runs)}") from stop


def overlap(options: argparse.Namespace) -> None:
    """Compare the masks of all criteria with the jackpots found from them."""
    runs = _configs(options)
    _load_nni(options, len(runs))
    from nni_jackpot.experiment import overlap as overlaps

    for swept, config in runs:
        title = named(swept)
        comparison = overlaps.overlap(config, options.overwrite)
        paths = overlaps.save(comparison) if rank() == 0 else []
        print(f"\n{title}".rstrip(), comparison.table(), comparison.legend(), sep="\n")
        if not any(path.suffix == ".png" for path in paths):
            print(f"no overlap.png, which needs matplotlib: {install_command('plot')}")
        print("written to", *paths, flush=True)


def report(options: argparse.Namespace) -> None:
    """Write the paper's tables and figures."""
    from nni_jackpot.experiment.report.write import write_report

    print(write_report(options.runs, options.output))


def config(options: argparse.Namespace) -> None:
    """Print every key of a run's file, or a file to begin with."""
    from nni_jackpot.experiment.reference.keys import markdown, yaml_text
    from nni_jackpot.experiment.reference.templates import TEMPLATES, commented

    name = options.template
    if name is None:
        print((markdown if options.markdown else yaml_text)(), end="")
    elif name in TEMPLATES:
        print(commented(TEMPLATES[name]), end="")
    else:
        allowed = f"{', '.join(TEMPLATES)}{close_match(name, TEMPLATES)}"
        raise ExperimentConfigError(f"--template: found {name}, allowed: {allowed}")


def examples(options: argparse.Namespace) -> None:
    """Print the names of shipped files, or the path of one."""
    files = shipped_files()
    if options.name is None:
        print(*files, sep="\n")
    elif options.name in files:
        print(files[options.name])
    else:
        raise ExperimentConfigError(
            f"{options.name} is not the name of a config or example{close_match(options.name, files)}"
        )


def _print_config(options: argparse.Namespace) -> None:
    """Print the YAML of the command: that of its options, or every value that the file stands for."""
    runs = _configs(options)
    if len(runs) > 1:
        raise ExperimentConfigError("--print-config: found a sweep, allowed: one run")
    content: Any = content_of(options) or to_dict(runs[0][1])
    for name, value in map(parse_override, options.set):
        content = overridden(content, name.split("."), value, name)
    print(strict_yaml.dump(content), end="")


def _load_nni(options: argparse.Namespace, count: int) -> None:
    """Import NNI, which takes seconds, and say so: the file has been read."""
    if "nni.compression" not in sys.modules:
        valid = "the run is valid" if count == 1 else f"{count} runs are valid"
        print(f"{options.file or PLACE}: {valid}; loading NNI", flush=True)
    import nni.compression  # noqa: F401

    _set_loudness(options)  # NNI sets its own when it is imported


def _set_loudness(options: argparse.Namespace) -> None:
    """Drop what NNI logs, a line per metric and module, unless it is asked for."""
    logging.getLogger("nni").setLevel(logging.INFO if options.verbose else logging.WARNING)
    if options.verbose:
        logging.getLogger("nni_jackpot").setLevel(logging.DEBUG)


def _configs(options: argparse.Namespace) -> list[tuple[dict[str, object], RunConfig]]:
    """Return the swept values and the config of every run of the command line."""
    from nni_jackpot.experiment import tracking

    fixed = _once("--set", map(parse_override, options.set)) | broadcast_result(tracking.tuner_parameters)
    given = content_of(options) if hasattr(options, "model") else None
    path = config_file(options.file) if given is None else Path(PLACE)
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
