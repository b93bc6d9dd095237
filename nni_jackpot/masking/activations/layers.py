"""Layers that multiply their input by a weight, as matrices of one row for each output feature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.modules.layouts import is_conv1d

KINDS = "Linear, Conv1d, Conv2d, Conv3d, or Conv1D of transformers"
# Most numbers of inputs that are written out at once; a convolution has an input for every place.
_MOST = 1 << 24


def is_matrix_layer(module: nn.Module) -> bool:
    """Return True for Linear, Conv1d, Conv2d, Conv3d, and Conv1D of transformers."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(module)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return the number of groups of a layer, and the number of inputs of a row."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups, module.in_channels // module.groups * math.prod(module.kernel_size)
    return 1, module.in_features if isinstance(module, nn.Linear) else module.nx  # type: ignore[return-value]


def to_rows(module: nn.Module, values: Tensor) -> Tensor:
    """Return a tensor of the weight's shape as matrices, one row for each output feature.

    Parameters
    ----------
    module
        A layer for which `is_matrix_layer` is true.
    values
        Of the shape of ``module.weight``: the weight, a mask or indices.

    Returns
    -------
    Tensor
        Of shape (groups, out of a group, in of a group); one group except for grouped convolutions. Columns
        are the input features; those of a convolution are ordered by channel, then by place in the kernel.
    """
    if is_conv1d(module):
        return values.t()[None]
    groups, inputs = matrix_shape(module)
    return values.reshape(groups, values.shape[0] // groups, inputs)


def from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Return matrices of `to_rows` as a tensor of the weight's shape."""
    if is_conv1d(module):
        return rows[0].t().contiguous()
    kernel = module.kernel_size if isinstance(module, nn.modules.conv._ConvNd) else ()
    groups, out, inputs = rows.shape
    return rows.reshape(groups * out, inputs // math.prod(kernel), *kernel)


def input_columns(module: nn.Module, inputs: Tensor, tokens: Tensor | None = None) -> Iterator[Tensor]:
    """Iterate over the inputs that the rows of a weight are multiplied by, in parts that fit into memory.

    Parameters
    ----------
    module
        A layer for which `is_matrix_layer` is true.
    inputs
        The input of one forward.
    tokens
        Boolean, of shape (batch, tokens): those to look at. Ignored where the input has no such dimensions.

    Yields
    ------
    Tensor
        Of shape (groups, samples, in of a group); a sample is a token, or a place that a kernel is put on.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        if tokens is not None and inputs.shape[:-1] == tokens.shape:
            inputs = inputs[tokens]
        yield inputs.reshape(1, -1, inputs.shape[-1])
        return
    spatial = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
    if padded.dim() == spatial + 1:
        padded = padded[None]
    places: Any = padded
    for i, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        places = places.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # Views of shape (batch, groups, channels of a group, places ..., kernel ...).
    places = places.unflatten(1, (module.groups, -1))
    channel, kernel = 2, range(3 + spatial, 3 + 2 * spatial)
    places = places.permute(1, 0, *range(3, 3 + spatial), channel, *kernel)
    per_image = math.prod(places.shape) // max(1, places.shape[1])
    for part in places.split(max(1, _MOST // max(1, per_image)), 1):
        yield part.flatten(2 + spatial).flatten(1, 1 + spatial)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the input of a layer from the arguments of its call; None if no argument is a tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
