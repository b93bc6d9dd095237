"""What a checkpoint of a search must hold, looked at before anything is taken over from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masking.targets import ScoredTarget, ScoreGroup
from nni_jackpot.runtime.distributed import world_size
from nni_jackpot.runtime.resume import damage_told
from nni_jackpot.search.clock import SearchClock

_TYPES: dict[str, type | tuple[type, ...]] = {
    "losses": int,
    "may_skip": bool,
    "clock": dict,
    "rankings": int,
    "trained": dict,
    "masks": dict,
    "buffers": dict,
    "optimizer": dict,
    "driver": dict,
    "random_start": list,
    "random": list,
    "sums": dict,
}


def check_saved(path: Path, saved: Mapping[str, Any], groups: Sequence[ScoreGroup], model: nn.Module) -> None:
    """See that all is there, and of the shapes of this search.

    Parameters
    ----------
    path
        The file, for messages.
    saved
        What the file holds.
    groups, model
        What is searched, and where.

    Raises
    ------
    CheckpointError
        If something is missing, of another type or shape, or a number that no search could have written.
    """
    with damage_told(path):
        _check(saved, groups, model)


def _check(saved: Mapping[str, Any], groups: Sequence[ScoreGroup], model: nn.Module) -> None:
    for name, kind in _TYPES.items():
        if type(saved.get(name)) is not kind:
            raise TypeError(f"{name} is {type(saved.get(name)).__name__}")
    if any(len(saved[name]) != world_size() for name in ("random_start", "random")):
        raise ValueError("random states are of another number of processes")
    clock = saved["clock"]
    if clock.keys() != {field.name for field in fields(SearchClock)}:
        raise ValueError("the clock has other fields")
    if not all(value is None or type(value) is int for value in clock.values()):
        raise TypeError("the clock holds what is no number")
    if not 0 < clock["step"] <= (clock["max_steps"] or clock["step"]) or saved["losses"] < clock["step"]:
        raise ValueError(f"step {clock['step']} of {clock['max_steps']} after {saved['losses']} losses")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved["trained"].keys() != trained.keys():
        raise ValueError("the parameters that are trained are others")
    for name, parameter in trained.items():
        _check_tensor(name, saved["trained"][name], parameter)
    for name, value in saved["buffers"].items():
        if not isinstance(value, Tensor):
            raise TypeError(f"buffer {name} is {type(value).__name__}")
        model.get_submodule(name.rpartition(".")[0])
    targets = {str(target): target for group in groups for target in group.members}
    if saved["masks"].keys() != targets.keys():
        raise ValueError("the masks are of other targets")
    for name, target in targets.items():
        _check_mask(name, saved["masks"][name], target)


def _check_tensor(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{name} has another shape or type")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{name} is NaN or infinite")


def _check_mask(name: str, state: Mapping[str, Any], target: ScoredTarget) -> None:
    _check_tensor(f"the mask of {name}", state["mask"], target.mask)
    expected = target.relaxed.state()
    if state.keys() - {"mask"} != expected.keys():
        raise ValueError(f"the mask of {name} has other settings")
    count = target.grains.count
    for key in ("keep", "kept"):
        if type(state[key]) is not int or not 0 < state[key] <= count:
            raise ValueError(f"{name} keeps {state[key]!r} of {count}")
    if int(target.grains.of_mask(state["mask"]).sum()) != state["kept"]:
        raise ValueError(f"the mask of {name} does not keep {state['kept']}")
    flipped = state["flipped"]
    if flipped is not None and flipped.numel():
        is_fit = (
            len(flipped) == count
            if flipped.dtype == torch.bool
            else 0 <= flipped.min() <= flipped.max() < count
        )
        if not is_fit:
            raise ValueError(f"the changes of {name} are of another size")
