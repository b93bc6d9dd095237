"""Checks of a run on this machine, and its speed: a few steps, which are thrown away."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, pairwise, repeat
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD

from nni_jackpot.errors import DatasetNotFoundError, NothingKeptError
from nni_jackpot.experiment.checks import config_list_of, device_of, pruner_options, validate_config_list
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.data.images import Batch
from nni_jackpot.experiment.data.loading import Data, load_data
from nni_jackpot.experiment.data.section import DataConfig, DataSection
from nni_jackpot.experiment.folder.pretrained import check_pretrained
from nni_jackpot.experiment.folder.run_folder import place_of
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.models.section import ModelConfig, TransformersConfig
from nni_jackpot.experiment.models.vision import load_image_classifier
from nni_jackpot.experiment.train import accuracy, cross_entropy_step, fit
from nni_jackpot.masking.budgets import kept_count
from nni_jackpot.masks import named_masks
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.runtime.files import check_folder

Shape = tuple[int, int, int]

_STEPS, _SECONDS = 8, 3.0  # enough to time a step
_TESTS = 4  # dense network, initial mask alone and re-estimated, jackpot


@dataclass(frozen=True)
class Pace:
    """Seconds of a training step, and of an evaluation on all test images."""

    step: float
    test: float

    def of_run(self, steps: int, epochs: int) -> float:
        """Return the estimated seconds of a run."""
        return steps * self.step + (epochs + _TESTS) * self.test


def check_here(config: RunConfig, shape: Shape, classes: int) -> str:
    """Check that this machine has the device, folder, data and weights of a run.

    Data that the run would download, and published weights, are not downloaded.

    Returns
    -------
    str
        What may still go wrong: weights that are not trained yet may rank so that a layer with shared zeros
        keeps none. Mostly empty.

    Raises
    ------
    JackpotError
        One of its kinds for an error that the run would raise.
    """
    device_of(config.device)
    check_folder(place_of(config))
    _data(config.data)
    torch.manual_seed(config.seed)
    model = untrained(config, shape, classes)
    is_there = isinstance(config.model, TransformersConfig) or check_pretrained(model, config)
    _refuse_too_few(config, copy.deepcopy(model))
    try:
        validate_config_list(config, model, is_pretrained=True)
    except NothingKeptError as error:
        weights = getattr(config.model, "weights", None)
        if is_there or (weights is None and config.pretrain.epochs == 0):
            raise
        return f"if trained weights rank as untrained ones do, the run will be refused: {error}"
    return ""


def _refuse_too_few(config: RunConfig, model: nn.Module) -> None:
    """Refuse layers that share fewer weights than there are layers."""
    groups: dict[object, list[dict[str, Any]]] = defaultdict(list)
    for entry in config_list_of(config, model):
        if entry.get("global_group_id") is not None and entry.get("sparse_ratio") is not None:
            groups[entry["global_group_id"]].append(entry)
    for group, entries in groups.items():
        ratio = entries[0]["sparse_ratio"]
        pruner = LotteryJackpotPruner(model, _each_alone(entries))
        masks = named_masks(pruner.get_masks()).values()
        pruner.unwrap_model()
        sizes = [mask.numel() for mask in masks if not mask.all()]
        if (kept := kept_count(sum(sizes), ratio)) < len(sizes):
            raise NothingKeptError(
                f"{len(sizes)} layers of global_group_id {group!r} would share {kept} weights: lower its "
                f"sparse_ratio, which is {ratio}"
            )


def _each_alone(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of a config list without shared budgets, so that each layer keeps some weights."""
    alone = [{key: value for key, value in entry.items() if key != "global_group_id"} for entry in entries]
    return [{"sparsity" if key == "total_sparsity" else key: v for key, v in e.items()} for e in alone]


def measure(config: RunConfig, shape: Shape, classes: int) -> Pace:
    """Time a few steps of a run's search, on a network that is thrown away.

    Raises
    ------
    JackpotError
        One of its kinds for an error that the steps raise.
    """
    device, data = device_of(config.device), _data(config.data)
    torch.backends.cudnn.deterministic = True  # as in the run
    model = untrained(config, shape, classes).to(device)
    size = config.data.batch_size
    blank = torch.zeros(size, *shape), torch.zeros(size, dtype=torch.int64)
    batches: Iterable[Batch] = [blank] if data is None else data.train
    ends: list[float] = []

    def on_step(_: Tensor) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    def train(model: nn.Module, optimizer: Any, training_step: Any, *lengths: Any) -> None:
        loader: Any = _for_a_while(batches)
        hooks: Any = {"on_step": on_step, "on_epoch": lambda: None}
        fit(model, optimizer, training_step, max_epochs=1, loader=loader, **hooks)

    optimizer = nni.trace(SGD)(model.parameters(), lr=0.1)
    pruner = LotteryJackpotPruner(
        model,
        _each_alone(config_list_of(config, model)),  # the run ranks other weights
        TorchEvaluator(train, optimizer, cross_entropy_step),
        **pruner_options(config.search, has_data=False),
    )
    pruner.compress(max_steps=_STEPS, norm_batches=[blank])
    step = statistics.median(end - start for start, end in pairwise(ends))
    if data is None:
        return Pace(step, 0.0)
    began = time.perf_counter()
    some: Any = list(islice(data.test, 1))
    accuracy(model, some, device)
    return Pace(step, (time.perf_counter() - began) * len(data.test))


def _for_a_while(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches repeatedly, until there are enough; after a time limit, at least two."""
    began = time.perf_counter()
    for number, batch in enumerate(chain.from_iterable(repeat(batches))):
        if number == _STEPS or (number >= 2 and time.perf_counter() - began > _SECONDS):
            return
        yield batch


def untrained(config: RunConfig, shape: Shape, classes: int) -> nn.Module:
    """Return the network of a run: of transformers as it is, else with random weights, without a download."""
    if isinstance(config.model, TransformersConfig):
        return load_image_classifier(config.model, classes).network
    assert isinstance(config.model, ModelConfig)
    return build_model(replace(config.model, weights=None), classes, shape[0])


@lru_cache(maxsize=1)
def _data(config: DataSection) -> Data | None:
    """Return the data set of a run; None if the run will download it."""
    assert isinstance(config, DataConfig)  # text is not rehearsed
    try:
        return load_data(replace(config, download=False), seed=0)
    except DatasetNotFoundError:
        if config.download:
            return None
        raise
