"""A network of two layers with batch norm, and its training under masks by hand; not a test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.masking.criteria import Losses
from nni_jackpot.masks import Masks
from nni_jackpot.training import SparseTraining, TrainingMethod, losses_on

SIZES = {"0.weight": 48, "2.weight": 18}
Batch = tuple[Tensor, Tensor]


def network(seed: int = 0) -> nn.Module:
    """Return a network with two layers to prune, of 48 and 18 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def batches(count: int = 4, seed: int = 1) -> list[Batch]:
    """Return batches of ten images with labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(10, 8, generator=generator), torch.randint(3, (10,), generator=generator))
        for _ in range(count)
    ]


def loss_of(batch: Batch, model: nn.Module) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module) -> Losses:
    """Return the losses of a model on two batches."""
    return losses_on(model, batches(2), loss_of)


def masks_with(first: int, second: int) -> Masks:
    """Return masks that keep the first few weights of both layers."""
    kept = [torch.arange(48) < first, torch.arange(18) < second]
    return {
        "0": {"weight": kept[0].view(6, 8).float(), "bias": None},
        "2": {"weight": kept[1].view(3, 6).float(), "bias": None},
    }


def train(
    model: nn.Module,
    method: TrainingMethod,
    masks: Masks,
    steps: int,
    epochs: int = 1,
    on_step: Callable[[int, SparseTraining], None] = lambda number, training: None,
) -> tuple[SparseTraining, torch.optim.SGD]:
    """Train a model by SGD with momentum, with a call after each step; return training and optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = SparseTraining(model, optimizer, masks, method, losses(model))
    training.begin(steps, epochs)
    data = batches()
    for number in range(1, steps + 1):
        loss_of(data[number % len(data)], model).backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
        on_step(number, training)
    return training, optimizer
