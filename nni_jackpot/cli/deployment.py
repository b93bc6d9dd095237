"""The commands after a search: ``nni-jackpot evaluate RUN|TICKET`` and ``deploy RUN|TICKET --form FORM``."""

from __future__ import annotations

import argparse
import inspect
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from prettytable import PrettyTable, TableStyle
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import parse_override
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.running.found import Found, find
from nni_jackpot.modules.batches import inputs_of
from nni_jackpot.runtime.registry import close_match
from nni_jackpot.speedup.forms import FORMS, deploy

_CALIBRATION_BATCHES = 4


def add_commands(commands: Any) -> None:
    """Add the commands to those of the parser."""
    text = "measure a jackpot and its dense network on the test data of its run"
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.set_defaults(command=_evaluate)
    _add_place(sub)

    text = "write a jackpot in a form that is smaller or faster, and check and measure what was written"
    sub = commands.add_parser("deploy", help=text, description=text)
    sub.set_defaults(command=_deploy)
    _add_place(sub)
    sub.add_argument(
        "--form",
        metavar="FORM",
        required=True,
        help=f"{', '.join(FORMS)}, or the name that a plugin registers",
    )
    text = "file or, for hf, new folder; by default in the folder deployed beside the jackpot"
    sub.add_argument("-o", "--output", metavar="OUT", type=Path, help=text)
    text = "samples that outputs are compared and latency is measured on; default: 8"
    sub.add_argument("--batch-size", metavar="N", type=_positive, default=8, help=text)


def _add_place(sub: Any) -> None:
    sub.add_argument("place", metavar="RUN|TICKET", type=Path, help="folder of a finished run, or a ticket")
    text = "YAML file of a ticket's run; config.yml beside the ticket by default"
    sub.add_argument("--config", metavar="FILE", type=Path, help=text)
    text = "override a value of the run's config: --set device=cpu --set data.root=FOLDER"
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    text = "module to import, from this folder or where Python looks for modules"
    sub.add_argument("--plugin", metavar="MODULE", action="append", default=[], help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"found {text}, allowed: a whole number from 1")
    return int(text)


def _found(options: argparse.Namespace) -> Found:
    return find(options.place, options.config, dict(map(parse_override, options.set)), options.plugin)


def _evaluate(options: argparse.Namespace) -> None:
    rows = _found(options).rows()
    measures = rows[0].values
    table = PrettyTable(["", *(MEASURES[name].words for name in measures), "sparsity %"])
    table.set_style(TableStyle.SINGLE_BORDER)
    table.align = "r"
    table.align[""] = "l"
    for row in rows:
        found = [MEASURES[name].spread([row.values[name]]) for name in measures]
        table.add_row([row.kind, *found, f"{100 * row.sparsity:.2f}"])
    print(table, flush=True)


def _deploy(options: argparse.Namespace) -> None:
    found = _found(options)
    name = options.form
    if name not in FORMS:
        raise ExperimentConfigError(
            f"--form: found {name}, allowed: {', '.join(FORMS)}{close_match(name, FORMS)}; "
            "a form of your own needs --plugin MODULE"
        )
    place: Path = options.place
    folder = place if place.is_dir() else place.parent
    output = options.output or folder / "deployed" / f"{name.replace(':', 'of')}{FORMS[name].suffix}"
    context, model = found.context, found.model
    inputs = [_inputs(model, batch) for batch in islice(context.data.test, 1)]
    example = tree_map_only(Tensor, lambda tensor: tensor[: options.batch_size], inputs[0])
    batches = [_inputs(model, batch) for batch in islice(context.data.sample, _CALIBRATION_BATCHES)]
    with _without_words_of_nni(options.verbose):
        written = deploy(
            model, found.masks, name, output, example, batches=batches, tokenizer=context.tokenizer
        )
    print(written, flush=True)


@contextmanager
def _without_words_of_nni(is_verbose: bool) -> Iterator[None]:
    """Drop what NNI's ModelSpeedup logs and prints for each layer."""
    if is_verbose:
        yield
        return
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _inputs(model: nn.Module, batch: Any) -> Any:
    """Return the inputs in a batch, as arguments or as a dict of keyword arguments."""
    args, kwargs = inputs_of(model, batch)
    if not kwargs:
        return args
    given = {name: value for name, value in kwargs.items() if name != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False  # the cache of a language model is for its next token, and no output
    return given
