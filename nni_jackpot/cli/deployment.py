"""The commands after a search: ``nni-jackpot evaluate RUN|TICKET`` and ``deploy RUN|TICKET --form FORM``."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import parse_override, to_dict
from nni_jackpot.experiment.data.section import DataConfig, seen_by
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.report.wording import table_of
from nni_jackpot.experiment.running.context import RunContext
from nni_jackpot.experiment.running.found import Found, find
from nni_jackpot.modules.batches import inputs_of
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.runtime.registry import close_match
from nni_jackpot.speedup.forms import FORMS
from nni_jackpot.speedup.forms import deploy as write_form

_CALIBRATION_BATCHES = 4


def _found(options: argparse.Namespace) -> Found:
    return find(options.place, options.config, dict(map(parse_override, options.set)), options.plugin)


def evaluate(options: argparse.Namespace) -> None:
    """Print what the dense network and the jackpot reach on the test data."""
    rows = _found(options).rows()
    measures = rows[0].values
    table = table_of(["", *(MEASURES[name].words for name in measures), "sparsity %"])
    for row in rows:
        found = [MEASURES[name].spread([row.values[name]]) for name in measures]
        table.add_row([row.kind, *found, f"{100 * row.sparsity:.2f}"])
    print(table, flush=True)


def deploy(options: argparse.Namespace) -> None:
    """Write a jackpot in a form, and print what was measured."""
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
        written = write_form(
            model, found.masks, name, output, example, batches=batches, tokenizer=context.tokenizer
        )
    print(written, flush=True)
    if isinstance(context.config.data, DataConfig):
        beside = output.with_name(f"{output.name.removesuffix(FORMS[name].suffix)}.inputs.json")
        text = json.dumps(_told_inputs(context), indent=2) + "\n"
        replace_file(beside, lambda aside: aside.write_text(text, encoding="utf-8"))
        print(f"{beside}: how images become its inputs, and what its outputs mean", flush=True)


def _told_inputs(context: RunContext) -> dict[str, Any]:
    """Return all that a program without this package must know to use a network of images."""
    data, seen = context.data, seen_by(context.config.data)
    if not seen.keys() & {"transform", "loader"}:
        own: Any = data.test.dataset
        given = to_dict(seen["preprocess"]) if "preprocess" in seen else {}
        given = {key: value for key, value in given.items() if value is not None}
        seen |= {"image_size": data.shape[-1], "preprocess": own.normalisation | given}
    return {"shape": ["images", *data.shape], **seen, "classes": [*data.classes] or data.num_classes}


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
