"""Normalisation statistics: left as they are, estimated anew, or the same in all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.hooks import RemovableHandle

from nni_jackpot.ranks import add_up, take_from_first, world


def reestimate(model: nn.Module, batches: Any) -> None:
    """Estimate batch-norm statistics anew by one pass over ``batches``, the mean over those of all processes.

    Parameters
    ----------
    model
        In the state that the statistics are to be of; its mode is left as it was.
    batches
        Iterable of input batches, or of lists and tuples that begin with one; as for
        `torch.optim.swa_utils.update_bn`, which does the work.
    """
    update_bn(batches, model, device=next(model.parameters()).device)
    statistics = _statistics(model)
    add_up(statistics)
    for statistic in statistics:
        statistic.div_(world())


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Leave with the statistics that there were."""
    before = [(buffer, buffer.clone()) for layer in _layers(model) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def share(model: nn.Module) -> None:
    """Take over the first process's statistics, as DistributedDataParallel does before every forward."""
    take_from_first(_statistics(model))


def hold(model: nn.Module) -> list[RemovableHandle]:
    """Have layers use the statistics they have, in train mode too, and leave them, while the hooks are on."""
    return [layer.register_forward_pre_hook(_evaluate) for layer in _layers(model)]


def _evaluate(layer: nn.Module, args: Any) -> None:  # at module level, for a wrapped model to be pickled
    layer.eval()


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "running_mean", None) is not None]


def _statistics(model: nn.Module) -> list[Tensor]:
    return [statistic for layer in _layers(model) for statistic in (layer.running_mean, layer.running_var)]
