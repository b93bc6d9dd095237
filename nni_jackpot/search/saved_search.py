"""Checks of a search's checkpoint, before anything is restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nni_jackpot.runtime.distributed import world_size
from nni_jackpot.runtime.resume import damage_told

if TYPE_CHECKING:
    from nni_jackpot.search.loop import Search

_TYPES: dict[str, type] = {
    "losses": int,
    "may_skip": bool,
    "clock": dict,
    "rankings": int,
    "trained": dict,
    "masks": dict,
    "buffers": dict,
    "optimizer": dict,
    "best": dict,
    "tuned": dict,
    "driver": dict,
    "random_start": list,
    "random": list,
    "sums": dict,
}


def check_saved(path: Path, saved: Mapping[str, Any], search: Search, model: nn.Module) -> None:
    """Check that a checkpoint is complete, and fits a search.

    Parameters
    ----------
    path
        The file, for messages.
    saved
        Content of the file.
    search, model
        The search, and the wrapped model.

    Raises
    ------
    CheckpointError
        If something is missing, of another type or shape, or a number that no search could have written.
    """
    with damage_told(path):
        for name, kind in _TYPES.items():
            if type(saved.get(name)) is not kind:
                raise TypeError(f"{name} is {type(saved.get(name)).__name__}")
        if any(len(saved[name]) != world_size() for name in ("random_start", "random")):
            raise ValueError("random states belong to another number of processes")
        search.check_state(saved)
        if saved["losses"] < saved["clock"]["step"]:
            raise ValueError(f"step {saved['clock']['step']} after {saved['losses']} losses")
        _check_trained(saved["trained"], model)
        for name, value in saved["buffers"].items():
            if not isinstance(value, Tensor):
                raise TypeError(f"buffer {name} is {type(value).__name__}")
            model.get_submodule(name.rpartition(".")[0])


def _check_trained(trained: Mapping[str, Any], model: nn.Module) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != parameters.keys():
        raise ValueError("the parameters that are trained are others")
    for name, parameter in parameters.items():
        value = trained[name]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(f"{name} has another shape or type")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} is NaN or infinite")
