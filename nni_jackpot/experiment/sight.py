"""The lines that a run prints at its start: device, data and network."""

from __future__ import annotations

import torch
from torch import nn

from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.data.loading import Data
from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.models.section import ModelConfig, ModelSection
from nni_jackpot.masks import Masks, named_masks, sparsity_of
from nni_jackpot.runtime.distributed import rank, world_size


def tell_start(config: RunConfig, device: torch.device, data: Data, model: nn.Module) -> None:
    """Print device, data and network of a run."""
    size = "x".join(map(str, data.shape))
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


def tell_search(dense: Row, start: Masks) -> None:
    """Print the measure of the dense network, and the size of the search."""
    searched = sum(mask.numel() for mask in named_masks(start).values())
    zeros = f"{100 * sparsity_of(start):.1f} %"
    name, value = next(iter(dense.values.items()))
    found = f"{100 * value:.2f} %" if MEASURES[name].is_percent else f"{value:.2f}"
    _say(f"dense {name} {found}; searching {searched:,} weights, {zeros} of them to be zero")


def network_of(model: ModelSection) -> str:
    """Return a network's name, with its size if the size is a setting."""
    if not isinstance(model, ModelConfig):
        return model.name
    size = f"-{model.depth}, {model.width} filters" if model.name == "resnet" else ""
    return f"{model.name}{size}{f', {model.weights}' if model.weights else ''}"


def _computes_on(device: torch.device) -> str:
    here = (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return f"{device}, {here}{processes}"


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
