"""The parts of a run assembled by hand, which a run must equal bit for bit; not a test.

One process here does the work of several processes: each backpropagates its share of a batch, half
of the loss where there are two. Halves are exact, and a sum of two gradients is the same in either order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import nni
import torch
from conftest import model_of
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.data.loading import Data, load_data
from nni_jackpot.experiment.folder.pretrained import cache_path, load_weights
from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.experiment.train import accuracy
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batch_norm import preserve_stats, reestimate
from nni_jackpot.search.clock import cosine

Shares = tuple[tuple[Tensor, Tensor], ...]


def data_of(config: RunConfig, processes: int = 1) -> list[Data]:
    """Return the data of a run, as in each process."""
    loaded = []
    for rank in range(processes):
        ranks = {"rank": lambda rank=rank: rank, "world_size": lambda: processes}
        with mock.patch.multiple("nni_jackpot.experiment.data.loading", **ranks):
            loaded.append(load_data(config.data, config.seed))
    return loaded


def batches_of(config: RunConfig, epochs: int, processes: int) -> Iterator[Shares]:
    """Yield the shares of every training batch."""
    loaders = [data.train for data in data_of(config, processes)]
    for _ in range(epochs):
        yield from zip(*loaders, strict=True)


def steps_of(config: RunConfig, epochs: int) -> int:
    """Return the number of steps in a number of epochs."""
    (data,) = data_of(config)
    return epochs * len(data.train)


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def backward(shares: Shares, model: nn.Module, step: Any) -> None:
    """Backpropagate the mean loss of shares; keep the norm statistics of the first share."""
    first, *others = shares
    for share in others:
        with preserve_stats(model):
            (step(share, model) / len(shares)).backward()
    (step(first, model) / len(shares)).backward()


def pretrained(config: RunConfig, masks: Masks | None = None) -> nn.Module:
    """Return the pre-trained network of a run, with masks applied."""
    model = model_of(config)
    load_weights(model, cache_path(config))
    apply_masks(model, masks or {})
    return model


def train(
    model: nn.Module, config: RunConfig, how: TrainConfig, masks: Masks | None = None, processes: int = 1
) -> None:
    """Train weights under masks."""
    steps = steps_of(config, how.epochs)
    options = {"momentum": how.momentum, "weight_decay": how.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), how.lr, **options)
    model.train()
    for step, shares in enumerate(batches_of(config, how.epochs, processes)):
        optimizer.param_groups[0]["lr"] = how.lr * cosine(step / steps)
        backward(shares, model, training_step)
        optimizer.step()
        optimizer.zero_grad()
        apply_masks(model, masks or {})


def searched(config: RunConfig, processes: int = 1, **options: Any) -> Masks:
    """Search the pre-trained network of a run, with options of the pruner."""
    model, epochs = pretrained(config), config.search.epochs

    def loop(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Any,
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for shares in batches_of(config, epochs, processes):
            backward(shares, model, training_step)
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(config.seed)
    evaluator = TorchEvaluator(loop, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), training_step)
    pruner = LotteryJackpotPruner(model, list(config.config_list), evaluator, **options)
    return pruner.compress(steps_of(config, epochs), None)[1]


def statistics_anew(model: nn.Module, config: RunConfig, processes: int = 1) -> dict[str, Tensor]:
    """Re-estimate norm statistics, and return their mean over all processes."""
    found = []
    for data in data_of(config, processes):
        reestimate(model, data.train)
        found.append(statistics(model))
    mean = {name: sum(each[name] for each in found) / processes for name in found[0]}
    model.load_state_dict(mean, strict=False)
    return mean


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the normalisation statistics."""
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def accuracy_of(model: nn.Module, config: RunConfig, processes: int = 1) -> float:
    """Return the accuracy on the test images; each process gets a share of every batch."""
    right = total = 0
    for data in data_of(config, processes):
        images = sum(len(labels) for _, labels in data.test)
        right += round(images * accuracy(model, data.test, torch.device("cpu")))
        total += images
    return right / total
