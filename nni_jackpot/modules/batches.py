"""Calls of a model with the batches of a loader."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call_model(model: nn.Module, batch: Any, device: torch.device | None = None) -> Any:
    """Call a model with the inputs in a batch.

    A dict provides arguments of the model's forward by name; if no name matches, the dict itself is the only
    input. A list or tuple provides its first items, one per required argument of forward; the rest are
    labels. If the first item is a dict, list or tuple, that item holds the inputs. Anything else is the only
    input.

    Parameters
    ----------
    model
        The model. For DataParallel, DistributedDataParallel and torch.compile the signature of the inner
        model counts.
    batch
        The batch.
    device
        Device to move tensors of the batch to; None leaves them.
    """
    args, kwargs = inputs_of(model, batch)
    if device is not None:
        args, kwargs = moved((args, kwargs), device)
    return model(*args, **kwargs)


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with all its tensors on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def inputs_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a model's forward, by position and by name; see `call_model`."""
    parameters = _signature(model)
    if isinstance(batch, Mapping):
        return _by_name(parameters, batch)
    if not isinstance(batch, list | tuple) or not batch:
        return (batch,), {}
    needed = _needed(parameters)
    first = batch[0]
    if isinstance(first, Mapping):
        return _by_name(parameters, first)
    if isinstance(first, list | tuple) and needed > 1:
        return tuple(first), {}
    return tuple(batch[: max(1, needed)]), {}


def _by_name(
    parameters: list[inspect.Parameter], batch: Mapping[Any, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = {p.name for p in parameters if p.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names.update(batch)
    given = {name: value for name, value in batch.items() if name in names}
    return ((), given) if given else ((batch,), {})


def _needed(parameters: list[inspect.Parameter]) -> int:
    """Return the number of required positional arguments."""
    return sum(p.kind in _POSITIONAL and p.default is inspect.Parameter.empty for p in parameters)


def _signature(model: nn.Module) -> list[inspect.Parameter]:
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        if not _is_shell(model):
            break
        model = inner
    wrapper = getattr(model, "_nni_wrapper", None)
    forward = model.forward if wrapper is None else wrapper.module_forward
    return list(inspect.signature(forward).parameters.values())


def _is_shell(model: nn.Module) -> bool:
    """Return True if a module passes all its arguments to an inner module."""
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    return kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
