"""The plan of a file's runs: networks, data, steps and estimated time; nothing is trained."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from tqdm import tqdm

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.checks import pruner_options, validate_config_list
from nni_jackpot.experiment.config import RunConfig, config_hash
from nni_jackpot.experiment.data.loading import load_data, used_images
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.folder.pretrained import cache_path, check_start
from nni_jackpot.experiment.folder.result import finished
from nni_jackpot.experiment.folder.run_folder import check_free
from nni_jackpot.experiment.models import validate_model
from nni_jackpot.experiment.rehearsal import Pace, Shape, check_here, measure, untrained
from nni_jackpot.experiment.report.wording import table_of
from nni_jackpot.experiment.running.context import RunContext, is_text
from nni_jackpot.experiment.sight import network_of
from nni_jackpot.experiment.sweep import named

_WIDTH = 100  # columns of a screen


def plan(
    runs: Sequence[tuple[dict[str, object], RunConfig]], here: bool = False, overwrite: bool = False
) -> str:
    """Check all runs of a file, and return tables of what each would do.

    Networks are built and config lists validated on them. Nothing is trained or written; files of known data
    sets are read only with ``here``.

    Parameters
    ----------
    runs
        Swept values and config of each run.
    here
        Whether to check that this machine has all that the runs need, and to estimate the time.
    overwrite
        Whether finished runs will be replaced.

    Raises
    ------
    JackpotError
        One of its kinds for an error that a run would raise, with the name of the run if there are several.
    """
    tried: dict[str, tuple[Pace | None, str]] = {}
    notes: dict[str, None] = {}
    trained: set[str] = set()
    rows: list[dict[str, str]] = []
    total, seconds = 0, 0.0
    for swept, config in runs:
        name = named(swept, short=True)
        try:
            is_finished = here and _is_finished(config, overwrite)
            if is_text(config):
                rows.append(_of_text(config, name, here, is_finished))
                continue
            images, shape, classes = _size(config)
            if (key := _what_a_trial_depends_on(config, here)) not in tried:
                tried[key] = _try(config, shape, classes, here)
        except JackpotError as error:
            raise type(error)(f"{name}: {error}" if name else str(error)) from error
        once = str(cache_path(config))
        pretrained = config.pretrain.checkpoint or cache_path(config).exists() or once in trained
        trained.add(once)
        pretrain = 0 if pretrained else config.pretrain.epochs
        tuned = sum(comparator.epochs for comparator in config.finetune.comparators().values())
        compared = sum(comparator.all_epochs for comparator in config.compared.values())
        before = f"{pretrain} epochs" if pretrain else "cached" if config.pretrain.epochs else "none"
        epochs = 0 if is_finished else pretrain + config.search.epochs + compared
        steps = epochs * math.ceil(images / config.data.batch_size)
        total += steps
        row = {
            "run": name or config.output,
            "data": config.data.name,
            "images": f"{images:,}",
            "network": network_of(config.model),
            "pre-training": before,
            "search": f"{config.search.epochs} epochs, {_how(config)}",
            "tuning": f"{tuned} epochs",
            "comparators": ", ".join(
                f"{name}: {own.all_epochs} epochs" for name, own in config.comparators.items()
            ),
            "steps": "is finished" if is_finished else f"{steps:,}",
        }
        pace, note = tried[key]
        if note:
            notes[f"note: {name}: {note}" if name else f"note: {note}"] = None
        if pace is not None:
            needed = 0.0 if is_finished else pace.of_run(steps, epochs)
            seconds += needed
            row["time"] = tqdm.format_interval(needed)
        rows.append(row)
    about = f", about {tqdm.format_interval(seconds)} on this machine" if here else ""
    # Runs of text are not timed.
    counted = f"{total:,} steps in all{about}; " if tried else ""
    total_line = f"{len(runs)} runs, {counted}nothing was trained"
    return "\n".join([_tables(rows), total_line, *(textwrap.fill(note, _WIDTH) for note in notes)])


def _of_text(config: RunConfig, name: str, here: bool, is_finished: bool) -> dict[str, str]:
    """Return the row of a run of text; with ``here``, network and text are loaded and checked."""
    search = config.search
    sequences = f"{sum(RunContext(config).data.train.order.sizes):,}" if here else ""
    how = f"{search.epochs} epochs, {_how(config)}"
    if search.blockwise is not None:
        polish = 0 if search.polish is None else search.polish.steps
        how = f"{search.blockwise.steps} steps a block, {polish} steps of polish"
    return {
        "run": name or config.output,
        "data": config.data.name,
        "sequences": sequences,
        "network": network_of(config.model),
        "search": how,
        "comparators": ", ".join(config.compared),
        "steps": "is finished" if is_finished else "",
    }


def _tables(rows: Sequence[dict[str, str]]) -> str:
    """Return a table of the values that all rows share, and a table of the others."""
    common = {name: v for name, v in rows[0].items() if v and all(row.get(name) == v for row in rows)}
    tables = []
    if common:
        table = table_of([])
        table.header = False
        table.add_rows([list(item) for item in common.items()])
        table.max_width = _WIDTH - 24  # beside the names
        table.align = "l"
        tables.append(table)
    # The names of the runs have the other differences.
    if differing := [
        name
        for name in rows[0]
        if name not in {*common, "data", "network", "search", "tuning", "comparators"}
    ]:
        table = table_of(differing)
        table.add_rows([[row[name] for name in differing] for row in rows])
        others = len(table.get_string().split("\n")[0]) - max(len(row["run"]) for row in rows)
        table.max_width["run"] = _WIDTH - others
        tables.append(table)
    return "\n".join(table.get_string() for table in tables)


def _size(config: RunConfig) -> tuple[int, Shape, int]:
    assert isinstance(config.data, DataConfig)  # text has no size before it is read
    known = DATASETS.find(config.data.name).size
    if known is None:  # the files decide
        data = load_data(config.data, config.seed)
        channels, height, width = data.shape
        return sum(data.train.order.sizes), (channels, height, width), data.num_classes
    images, (channels, height, width), classes = known
    images = len(used_images(config.data, images)[0])
    size = config.data.image_size
    return images, (channels, size or height, size or width), classes


def _what_a_trial_depends_on(config: RunConfig, here: bool) -> str:
    """Return a key that is equal for runs that need one trial in all."""
    names = ["data", "model", "config_list", "preset", "sparsity", *(["device", "pretrain"] if here else [])]
    parts = {name: getattr(config, name) for name in names}
    return config_hash({**parts, "options": pruner_options(config.search), "init": config.search.init})


def _is_finished(config: RunConfig, overwrite: bool) -> bool:
    """Return True if the run is finished; raises OutputFolderError if another run is finished there."""
    check_free(config, overwrite)
    return not overwrite and finished(config) is not None


def _try(config: RunConfig, shape: Shape, classes: int, here: bool) -> tuple[Pace | None, str]:
    """Build and wrap the network; with ``here``, check the machine and time a few steps as well.

    Returns
    -------
    tuple
        The speed, None without ``here``; and what may still go wrong.
    """
    check_start(config, classes)
    model = untrained(config, shape, classes)
    validate_model(config.model, model, classes, shape)
    validate_config_list(config, model)
    if not here:
        return None, ""
    note = check_here(config, shape, classes)
    return measure(config, shape, classes), note


def _how(config: RunConfig) -> str:
    search = config.search
    return search.recipe if search.method == "edge_popup" else f"{search.method}, {search.recipe}"
