"""The training loop that weights and scores share, and the accuracy it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from nni_jackpot.errors import TrainingDivergedError
from nni_jackpot.experiment.config import TrainConfig
from nni_jackpot.experiment.data.images import Batch
from nni_jackpot.experiment.data.loading import TrainLoader
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.processes import averaged
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batch_norm import broadcast_stats
from nni_jackpot.runtime.distributed import all_reduce_sum
from nni_jackpot.search.clock import cosine


def cross_entropy_step(batch: Batch, model: nn.Module) -> Tensor:
    """Return the loss of a batch ``(images, labels)``; NNI's ``training_step``.

    The batch is moved to the model here and not by the loop, so that a resumed search, which passes over
    steps, does not move theirs.
    """
    images, labels = to_device(batch, next(model.parameters()).device)
    return F.cross_entropy(model(images), labels)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, without waiting where its memory is pinned."""
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    training_step: Callable[..., Tensor],
    lr_scheduler: LRScheduler | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    *,
    loader: DataLoader[Any],
    on_step: Callable[[Tensor], None],
    on_epoch: Callable[[], None],
) -> None:
    """Train for ``max_epochs`` epochs or ``max_steps`` steps, whichever ends first; NNI's ``training_func``.

    ``on_step`` is called with the detached loss after each step, ``on_epoch`` after each epoch.
    """
    if max_epochs is None and max_steps is None:
        raise ValueError("say how long to train: max_steps, max_epochs")
    steps = 0
    for _ in count() if max_epochs is None else range(max_epochs):
        model.train()
        for batch in loader:
            if steps == max_steps:  # asked only here, so that an epoch that ends with them is reported
                return
            loss = training_step(batch, model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if lr_scheduler is not None:
                lr_scheduler.step()
            steps += 1
            on_step(loss.detach())
        on_epoch()


def train_weights(
    model: nn.Module,
    config: TrainConfig,
    loader: TrainLoader,
    file: EpochFile,
    on_step: Callable[[Tensor], None],
    on_epoch: Callable[[], None],
    on_skip: Callable[[int], None],
    masks: Masks | None = None,
) -> None:
    """Train weights by SGD with a cosine schedule; under masks, pruned weights stay zero (Eq. 9).

    Parameters
    ----------
    model
        Its weights, in place.
    config
        How long, and how.
    loader
        About to begin its first epoch.
    file
        Is written after every epoch; the training goes on from it. It stays at the end, for who called to
        remove it when the weights are safe.
    on_step
        Called with the detached loss after each step.
    on_epoch
        Called after each epoch.
    on_skip
        Called at first, with the number of epochs that an interrupted training has been through.
    masks
        Of what is to stay zero.

    Raises
    ------
    TrainingDivergedError
        If the loss is not finite at the end of an epoch.
    CheckpointError
        If the file is damaged, or of another training.
    """
    optimizer = SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    total_steps = max(1, config.epochs * len(loader))  # no epochs: the weights as they are drawn
    scheduler = LambdaLR(optimizer, lambda step: cosine(min(1.0, step / total_steps)))
    pruned = _pruned_places(model, masks or {})

    @torch.no_grad()
    def keep_zeros(*_: Any) -> None:
        for parameter, places in pruned:
            parameter.masked_fill_(places, 0)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    epochs = loader.order.epoch = file.load(parts)
    on_skip(epochs)
    last_loss = torch.zeros(())

    def remember(loss: Tensor) -> None:
        nonlocal last_loss
        last_loss = loss
        on_step(loss)

    def end_epoch() -> None:
        nonlocal epochs
        if not last_loss.isfinite():  # once an epoch, for a look at each loss would wait for the device
            file.remove()
            raise TrainingDivergedError(
                f"the loss became {last_loss.item()}: lower the lr, which is {config.lr}"
            )
        on_epoch()
        epochs += 1
        file.save(epochs, parts)

    keep_zeros()
    optimizer.register_step_post_hook(keep_zeros)
    fit(
        averaged(model),
        optimizer,
        cross_entropy_step,
        scheduler,
        max_epochs=config.epochs - epochs,
        loader=loader,
        on_step=remember,
        on_epoch=end_epoch,
    )


def _pruned_places(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    return [
        (parameters[f"{module}.{target}"], mask.to(parameters[f"{module}.{target}"].device) == 0)
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    ]


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Return the share of images classified right, in [0, 1]; the model's mode is left as it was.

    Each process looks at a share of the images, by the statistics of the first.
    """
    training = model.training
    model.eval()
    broadcast_stats(model)
    right, total = torch.zeros((2,), dtype=torch.int64, device=device)
    for batch in loader:
        images, labels = to_device(batch, device)
        right += (model(images).argmax(1) == labels).sum()
        total += len(labels)
    all_reduce_sum((right, total))
    model.train(training)
    return right.item() / total.item()
