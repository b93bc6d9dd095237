"""What a model gives for an example, and whether another form of it gives the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_jackpot.errors import SpeedupError
from nni_jackpot.speedup.calls import Call


def reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises
    ------
    SpeedupError
        If it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # what modules hold raises whatever it likes
        raise SpeedupError(f"the model cannot be copied: {reason(error)}") from error


def outputs_of(model: nn.Module, call: Call, form: str = "the masked model") -> list[Tensor]:
    """Return all tensors that a model gives, in the order in which they are nested.

    It is called with copies of the tensors, and random numbers go on from where they were before. What the
    model changes of itself stays changed: give a copy.

    Raises
    ------
    SpeedupError
        If the model fails, or gives no tensor.
    """
    own = call.on(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    gpus = {tensor.device for tensor in own.tensors() if tensor.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng([*gpus]):
            found = _tensors_in(model(*own.args, **own.kwargs))
    except Exception as error:  # the model's own code
        raise SpeedupError(f"{form} fails on the example input: {reason(error)}") from error
    if not found:
        raise SpeedupError(f"{form} gives no tensor for the example input: there is nothing to compare")
    return found


def check_same(expected: Sequence[Tensor], found: Sequence[Tensor], form: str, advice: str = "") -> None:
    """See that a form of a model gives what the model gives, up to rounding.

    Each tensor may differ by its largest finite value times the square root of its precision: 3.5e-4 for
    float32.

    Raises
    ------
    SpeedupError
        If it does not.
    """
    if [x.shape for x in expected] != [x.shape for x in found]:
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (found, expected)]
        raise SpeedupError(f"{form} gives tensors of shapes {shapes[0]}, the masked model {shapes[1]}")
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        precision = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.cpu().to(wide), b.cpu().to(wide)
        differs = ~((a == b) | (a.isnan() & b.isnan()))  # inf - inf is NaN
        if not differs.any():
            continue
        largest = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
        difference = (a - b)[differs].abs().max().item()
        if not difference <= largest * precision**0.5:  # so that NaN differs
            raise SpeedupError(
                f"{form} differs from the masked model by {difference:.2g} in output {i}, whose largest "
                f"value is {largest:.2g}{advice}"
            )


def _tensors_in(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            parts = leaf.unbind() if leaf.is_nested else [leaf]
            found += [part if part.layout == torch.strided else part.to_dense() for part in parts]
        elif isinstance(leaf, Mapping):  # of a class that PyTorch does not look into
            found += _tensors_in(list(leaf.values()))
        elif is_dataclass(leaf):
            found += _tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found
