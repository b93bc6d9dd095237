"""Running statistics of normalisation layers: preserve, re-estimate, freeze or broadcast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_jackpot.errors import CalibrationError
from nni_jackpot.modules.batches import call_model
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.runtime.distributed import all_gather, all_reduce_sum, broadcast_tensors, world_size


@torch.no_grad()
def reestimate(model: nn.Module, batches: Any) -> None:
    """Re-estimate batch-norm statistics by one pass over ``batches``, averaged over all processes.

    Parameters
    ----------
    model
        The model, masks applied. Its training mode is restored.
    batches
        Iterable of batches, passed to the model by `nni_jackpot.modules.batches.call_model`.

    Raises
    ------
    CalibrationError
        If there is no batch, or the model fails on one. All statistics are then unchanged.
    """
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in _layers(model)):
        return
    with reestimating(model), restored_modes(model):
        model.train()
        if 0 in all_gather(_run(model, batches)):
            raise CalibrationError("norm statistics need a batch; the batches have none, or none is left")


@contextmanager
def reestimating(model: nn.Module) -> Iterator[None]:
    """Replace batch-norm statistics by the mean over the forwards of the block, and over all processes.

    Layers must be in train mode in the block. After an error the statistics are unchanged.
    """
    layers: list[Any] = [x for x in _layers(model) if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = _copies(layers)
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative instead of exponential average
        yield
        statistics = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
        all_reduce_sum(statistics)
        for statistic in statistics:
            statistic.div_(world_size())
    except BaseException:
        _put_back(before)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum


@contextmanager
def normalizing_by_batch(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode for the block, except batch norm, which takes the statistics of batches."""
    with restored_modes(model):
        model.eval()
        for layer in _layers(model):
            layer.train()
        yield


def has_batch_norm(model: nn.Module) -> bool:
    """Return True if a layer normalizes by the statistics of batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _run(model: nn.Module, batches: Any) -> int:
    """Run a model over batches, and return the number of batches."""
    device = next(model.parameters()).device
    count = 0
    for batch in batches:
        try:
            call_model(model, batch, device)
        except Exception as error:  # the model's code may raise any error
            reason = f"the model fails on batch {count + 1} for norm statistics: {error}"
            raise CalibrationError(reason) from error
        count += 1
    return count


@contextmanager
def preserve_stats(model: nn.Module) -> Iterator[None]:
    """Restore the statistics after the block."""
    before = _copies(_layers(model))
    try:
        yield
    finally:
        _put_back(before)


def _copies(layers: list[Any]) -> list[tuple[Tensor, Tensor]]:
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]


def _put_back(values: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in values:
        buffer.copy_(value)


def broadcast_stats(model: nn.Module) -> None:
    """Copy the statistics of rank 0, as DistributedDataParallel does before every forward."""
    broadcast_tensors(_statistics(model))


def freeze_stats(model: nn.Module) -> list[RemovableHandle]:
    """Use the running statistics in train mode too, without updates, until the returned hooks are removed."""
    return [layer.register_forward_pre_hook(_evaluate) for layer in _layers(model)]


def _evaluate(layer: nn.Module, args: Any) -> None:  # at module level, so that the model can be pickled
    layer.eval()


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "running_mean", None) is not None]


def _statistics(model: nn.Module) -> list[Tensor]:
    return [statistic for layer in _layers(model) for statistic in (layer.running_mean, layer.running_var)]
