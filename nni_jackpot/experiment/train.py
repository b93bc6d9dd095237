"""The training loop that weights and scores share, and the accuracy of a model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from nni_jackpot.errors import SearchDivergedError, TrainingDivergedError
from nni_jackpot.experiment.comparators import Comparator
from nni_jackpot.experiment.data.images import Batch
from nni_jackpot.experiment.data.loading import TrainLoader
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.processes import averaged
from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batch_norm import broadcast_stats
from nni_jackpot.runtime.distributed import all_reduce_sum
from nni_jackpot.search.clock import cosine
from nni_jackpot.search.match_dense import values_of
from nni_jackpot.training import SparseTraining, TrainingMethod


def cross_entropy_step(batch: Batch, model: nn.Module) -> Tensor:
    """Return the loss of a batch ``(images, labels)``; NNI's ``training_step``.

    The step moves the batch to the model's device, and not the loop: a resumed search skips steps, and their
    batches need not move.
    """
    images, labels = to_device(batch, next(model.parameters()).device)
    return F.cross_entropy(values_of(model(images)), labels)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device, without waiting if its memory is pinned."""
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
        raise ValueError("fit() needs max_steps or max_epochs")
    steps = 0
    for _ in count() if max_epochs is None else range(max_epochs):
        model.train()
        for batch in loader:
            if steps == max_steps:  # checked here, so that an epoch that ends with the last step is reported
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
    training_step: Callable[..., Tensor] = cross_entropy_step,
    seed: int = 0,
    losses: Losses | None = None,
) -> Masks:
    """Train weights by SGD with a cosine schedule; under masks, pruned weights stay zero (Eq. 9).

    A comparator of several trainings, such as iterative pruning, gets the schedule again for each.

    Parameters
    ----------
    model
        The network, changed in place.
    config
        Settings of the training; a `Comparator` updates the masks as well.
    loader
        Training batches, before the first epoch.
    file
        Written after every epoch; the training resumes from it. The caller removes it once the weights are
        saved.
    on_step
        Called with the detached loss after each step.
    on_epoch
        Called after each epoch.
    on_skip
        Called at first, with the number of epochs that an interrupted training has completed.
    masks
        Masks at the start; weights without a mask are not pruned.
    training_step
        Returns the loss of a batch and the model.
    seed
        Seed of what a comparator draws.
    losses
        Losses of a few batches, for a comparator that ranks by them.

    Returns
    -------
    Masks
        The masks at the end.

    Raises
    ------
    TrainingDivergedError
        If the loss is not finite at the end of an epoch, or a comparator ranks a NaN.
    CheckpointError
        If the file is damaged, or belongs to another training.
    """
    optimizer = SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    length = max(1, config.epochs * len(loader))  # without epochs, the weights stay at their start
    method = config if isinstance(config, Comparator) else TrainingMethod()
    max_epochs = config.epochs * method.trainings
    scheduler = LambdaLR(optimizer, lambda step: cosine(step % length / length))
    masked = SparseTraining(model, optimizer, masks or {}, method, losses, seed)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "masks": masked}
    epochs = loader.order.epoch = file.load(parts)
    on_skip(epochs)
    last_loss = torch.zeros(())

    def remember(loss: Tensor) -> None:
        nonlocal last_loss
        last_loss = loss
        on_step(loss)

    def end_epoch() -> None:
        nonlocal epochs
        if not last_loss.isfinite():  # once an epoch: reading each loss would wait for the device
            file.remove()
            raise TrainingDivergedError(
                f"the loss became {last_loss.item()}: lower the lr, which is {config.lr}"
            )
        on_epoch()
        epochs += 1
        file.save(epochs, parts)

    optimizer.register_step_post_hook(lambda *_: masked.step())
    try:
        masked.begin(length * method.trainings, max_epochs)
        fit(
            averaged(model),
            optimizer,
            training_step,
            scheduler,
            max_epochs=max_epochs - epochs,
            loader=loader,
            on_step=remember,
            on_epoch=end_epoch,
        )
    except SearchDivergedError as error:  # of the ranking
        file.remove()
        raise TrainingDivergedError(
            f"a weight or gradient became NaN: lower the lr, which is {config.lr}"
        ) from error
    return masked.finish()


def accuracy(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Return the share of images classified correctly, in [0, 1]; as `top_accuracies`."""
    return top_accuracies(model, loader, device, 1)[0]


@torch.no_grad()
def top_accuracies(
    model: nn.Module, loader: DataLoader[Any], device: torch.device, *tops: int
) -> list[float]:
    """Return the share of images whose class is among the k likeliest, in [0, 1], for each k.

    The model's mode is preserved. Each process evaluates a share of the images, with the norm statistics of
    the first process.
    """
    training = model.training
    model.eval()
    broadcast_stats(model)
    *right, total = torch.zeros((len(tops) + 1,), dtype=torch.int64, device=device)
    for batch in loader:
        images, labels = to_device(batch, device)
        outputs = values_of(model(images))
        for i, top in enumerate(tops):
            likeliest = outputs.argmax(1, keepdim=True) if top == 1 else outputs.topk(top, 1).indices
            right[i] += (likeliest == labels[:, None]).sum()
        total += len(labels)
    all_reduce_sum((*right, total))
    model.train(training)
    return [count.item() / total.item() for count in right]
