"""Normalisation statistics: estimated anew, or the same in all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

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


def share(model: nn.Module) -> None:
    """Take over the first process's statistics, as DistributedDataParallel does before every forward."""
    take_from_first(_statistics(model))


def _statistics(model: nn.Module) -> list[Tensor]:
    found = [
        getattr(module, name, None) for module in model.modules() for name in ("running_mean", "running_var")
    ]
    return [statistic for statistic in found if isinstance(statistic, torch.Tensor)]
