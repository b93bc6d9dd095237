"""Outputs of a model on an example, and their comparison with the outputs of a converted model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_jackpot.errors import SpeedupError, first_line
from nni_jackpot.speedup.calls import Call


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises
    ------
    SpeedupError
        If the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # attributes of modules may raise any error
        raise SpeedupError(f"the model cannot be copied: {first_line(error)}") from error


def outputs_of(model: nn.Module, call: Call, form: str = "the masked model") -> list[Tensor]:
    """Return all output tensors of a model, in nesting order.

    The model gets copies of the inputs, and the random states are restored. Changes that the model makes to
    itself are not undone: pass a copy.

    Raises
    ------
    SpeedupError
        If the model fails, or returns no tensor.
    """
    own = call.on(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    gpus = {tensor.device for tensor in own.tensors() if tensor.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng([*gpus]):
            found = tensors_in(model(*own.args, **own.kwargs))
    except Exception as error:  # the model's own code
        raise SpeedupError(f"{form} fails on the example input: {first_line(error)}") from error
    if not found:
        raise SpeedupError(f"{form} gives no tensor for the example input: there is nothing to compare")
    return found


def check_same(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    form: str,
    advice: str = "",
    tolerance: float | None = None,
) -> float:
    """Check that a converted model gives the outputs of the masked model, up to a tolerance.

    Parameters
    ----------
    expected, found
        Outputs of the masked and of the converted model.
    form
        Name of the converted model, for the message.
    advice
        End of the message.
    tolerance
        Largest difference, as a share of the largest finite value of each tensor. None for rounding errors:
        the square root of the machine epsilon of the tensor's dtype, 3.5e-4 for float32.

    Returns
    -------
    float
        The largest difference that was found, as such a share.

    Raises
    ------
    SpeedupError
        If the shapes differ, or values differ by more.
    """
    if [x.shape for x in expected] != [x.shape for x in found]:
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (found, expected)]
        raise SpeedupError(f"{form} gives tensors of shapes {shapes[0]}, the masked model {shapes[1]}")
    most = 0.0
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        precision = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.cpu().to(wide), b.cpu().to(wide)
        differs = ~((a == b) | (a.isnan() & b.isnan()))  # inf - inf is NaN
        if not differs.any():
            continue
        largest = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
        difference = (a - b)[differs].abs().max().item()
        allowed = precision**0.5 if tolerance is None else tolerance
        if not difference <= largest * allowed:  # "not <=", so that NaN differs
            raise SpeedupError(
                f"{form} differs from the masked model by {difference:.2g} in output {i}, whose largest "
                f"value is {largest:.2g}{advice}"
            )
        most = max(most, difference / largest)
    return most


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return all tensors of a model's output, in nesting order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            parts = leaf.unbind() if leaf.is_nested else [leaf]
            found += [part if part.layout == torch.strided else part.to_dense() for part in parts]
        elif isinstance(leaf, Mapping):  # a class that PyTorch's tree_leaves does not flatten
            found += tensors_in(list(leaf.values()))
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found
