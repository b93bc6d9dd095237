"""What a model gives for an example, and whether another form of it gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_jackpot.errors import SpeedupError

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]


def on_cpu(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the inputs of a model as a tuple, on the CPU."""
    return tuple(x.cpu() for x in (inputs if isinstance(inputs, tuple) else (inputs,)))


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return all tensors that a model gives, in the order in which they are nested."""
    return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def check_same(expected: Sequence[Tensor], found: Sequence[Tensor], form: str, advice: str = "") -> None:
    """See that a form of a model gives what the model gives, up to rounding.

    Each tensor may differ by its largest value times the square root of its precision: 3.5e-4 for float32.

    Raises
    ------
    SpeedupError
        If it does not.
    """
    if [x.shape for x in expected] != [x.shape for x in found]:
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (found, expected)]
        raise SpeedupError(f"{form} gives tensors of shapes {shapes[0]}, the masked model {shapes[1]}")
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not a.numel():
            continue
        precision = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        largest, difference = a.double().abs().max().item(), (a.double() - b.double()).abs().max().item()
        if not difference <= largest * precision**0.5:  # so that NaN differs
            raise SpeedupError(
                f"{form} differs from the masked model by {difference:.2g} in output {i}, whose largest "
                f"value is {largest:.2g}{advice}"
            )
