"""What the runs of a file would train, on what and for how long, without any of it done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from prettytable import PrettyTable, TableStyle

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, config_hash
from nni_jackpot.experiment.data import load_data, used_images
from nni_jackpot.experiment.grid import shown
from nni_jackpot.experiment.models import build_model, try_model
from nni_jackpot.experiment.pretrained import cache_path, check_start
from nni_jackpot.experiment.run import pruner_options, try_config_list

Shape = tuple[int, int, int]

# Training images, their shape and the number of classes of published datasets, which need not be there.
_KNOWN: dict[str, tuple[int, Shape, int]] = {
    "digits": (1437, (1, 8, 8), 10),
    "mnist": (60_000, (1, 28, 28), 10),
    "fashion_mnist": (60_000, (1, 28, 28), 10),
    "cifar10": (50_000, (3, 32, 32), 10),
    "cifar100": (50_000, (3, 32, 32), 100),
    "imagenet": (1_281_167, (3, 224, 224), 1000),
}


def plan(runs: Sequence[tuple[dict[str, object], RunConfig]]) -> str:
    """Check all runs of a file, and return a table of what each would do.

    Networks are built and config lists tried on them, but nothing is trained or written, and of the published
    datasets no file is looked for.

    Raises
    ------
    JackpotError
        One of its kinds for what a run would stumble over; named with the run, where there are several.
    """
    table = PrettyTable(["run", "data", "images", "network", "pre-training", "search", "tuning", "steps"])
    table.set_style(TableStyle.SINGLE_BORDER)
    table.align = "r"
    for column in ("run", "data", "network"):
        table.align[column] = "l"
    tried: set[str] = set()
    trained: set[str] = set()
    total = 0
    for swept, config in runs:
        name = ", ".join(f"{key.split('.')[-1]}={shown(value)}" for key, value in swept.items())
        images, shape, classes = _size(config)
        _try(config, shape, classes, tried, name)
        once = str(cache_path(config))
        pretrained = config.pretrain.checkpoint or cache_path(config).exists() or once in trained
        trained.add(once)
        pretrain = 0 if pretrained else config.pretrain.epochs
        tuned = config.finetune.epochs * (2 if config.finetune.under == "both" else 1)
        steps = (pretrain + config.search.epochs + tuned) * math.ceil(images / config.data.batch_size)
        total += steps
        table.add_row(
            [
                name or config.output,
                config.data.name,
                f"{images:,}",
                _network(config),
                f"{pretrain} epochs" if pretrain else "none" if not config.pretrain.epochs else "is there",
                f"{config.search.epochs} epochs, {_how(config)}",
                f"{tuned} epochs",
                f"{steps:,}",
            ]
        )
    return f"{table.get_string()}\n{len(runs)} runs, {total:,} steps in all; nothing was trained"


def _size(config: RunConfig) -> tuple[int, Shape, int]:
    if config.data.name not in _KNOWN:  # the user's own folder
        data = load_data(config.data, config.seed)
        return sum(data.train.order.sizes), data.shape, data.num_classes
    images, (channels, height, width), classes = _KNOWN[config.data.name]
    images = len(used_images(config.data, images)[0])
    size = config.data.image_size
    return images, (channels, size or height, size or width), classes


def _try(config: RunConfig, shape: Shape, classes: int, tried: set[str], name: str) -> None:
    """Build the network and wrap it, once for all runs that agree in that."""
    options = pruner_options(config.search)
    key = config_hash({"model": config.model, "entries": config.config_list, "shape": shape, "how": options})
    if key in tried:
        return
    tried.add(key)
    try:
        check_start(config, classes)
        model = build_model(replace(config.model, weights=None), classes, shape[0])
        try_model(config.model, model, classes, shape)
        try_config_list(config, model)
    except ExperimentConfigError as error:
        raise ExperimentConfigError(f"{name}: {error}" if name else str(error)) from error


def _how(config: RunConfig) -> str:
    search = config.search
    return search.recipe if search.method == "edge_popup" else f"{search.method}, {search.recipe}"


def _network(config: RunConfig) -> str:
    model = config.model
    size = f"-{model.depth}, {model.width} filters" if model.name == "resnet" else ""
    return f"{model.name}{size}{f', {model.weights}' if model.weights else ''}"
