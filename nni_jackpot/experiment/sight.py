"""The lines that a run prints at its start: device, data, network, and what the dense network achieves."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.data.loading import Data
from nni_jackpot.experiment.data.section import DataConfig, TextConfig
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.models.section import ModelConfig, ModelSection, TransformersConfig
from nni_jackpot.masks import Masks, named_masks, sparsity_of
from nni_jackpot.runtime.distributed import rank, world_size


def tell_start(config: RunConfig, device: torch.device, data: Data, model: nn.Module) -> None:
    """Print device, data and network of a run."""
    size = _size(data)
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(data.train.order.sizes) * world_size()
    if isinstance(config.data, TextConfig):
        _say(
            f"{_computes_on(device)}; {config.data.name}: {trained:,} sequences of {size} tokens; "
            f"{config.model.name}: {weights:,} weights"
        )
        return
    _say(
        f"{_computes_on(device)}; {config.data.name}: {trained:,} images of {size} for training, "
        f"{data.num_classes} classes; {network_of(config.model)}: {weights:,} weights"
    )


def tell_dense(config: RunConfig, data: Data, dense: Row) -> None:
    """Print the measure of the dense network; warn if given weights do no better than guessing."""
    name, value = next(iter(dense.values.items()))
    found = f"{100 * value:.2f} %" if MEASURES[name].is_percent else f"{value:.2f}"
    what = f"sequences of {data.shape[0]} tokens" if isinstance(config.data, TextConfig) else "images of "
    _say(f"dense {name} {found} on {data.tested:,} {what}{_size(data) if data.num_classes else ''}")
    given = config.pretrain.checkpoint, getattr(config.model, "weights", None)
    is_given = isinstance(config.model, TransformersConfig) or given != (None, None)
    if dense.accuracy is None or not isinstance(config.data, DataConfig) or not is_given or rank() != 0:
        return
    chance = 1 / data.num_classes
    if dense.accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / data.tested):
        logging.getLogger(__name__).warning(
            "the dense network does no better than guessing among %d classes: check that the class "
            "folders are in the order of its outputs, and how images become its inputs: %s",
            data.num_classes,
            seen_as(config.data),
        )


def seen_as(data: DataConfig) -> str:
    """Return in words how images become inputs of the network."""
    if by := data.loader or data.transform:
        return f"by {by}"
    if data.preprocess is None:
        return "mean and std of the training images"
    values = {"image_size": data.image_size, **vars(data.preprocess)}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def tell_search(start: Masks) -> None:
    """Print the size of the search."""
    searched = sum(mask.numel() for mask in named_masks(start).values())
    _say(f"searching {searched:,} weights, {100 * sparsity_of(start):.1f} % of them to be zero")


def network_of(model: ModelSection) -> str:
    """Return a network's name, with its size if the size is a setting."""
    if not isinstance(model, ModelConfig):
        return model.name
    size = f"-{model.depth}, {model.width} filters" if model.name == "resnet" else ""
    return f"{model.name}{size}{f', {model.weights}' if model.weights else ''}"


def _size(data: Data) -> str:
    return "x".join(map(str, data.shape))


def _computes_on(device: torch.device) -> str:
    here = (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return f"{device}, {here}{processes}"


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
