"""What layers see: sums over their inputs, gathered by forward hooks, for criteria that need activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


def is_matrix_layer(module: nn.Module) -> bool:
    """Return whether a layer multiplies its input by a weight: Linear, Conv2d, or Conv1D of transformers."""
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_transposed(module)


def to_rows(module: nn.Module, values: Tensor) -> Tensor:
    """Return a tensor of the weight's shape as matrices, one row for each output feature.

    Parameters
    ----------
    module
        Linear, Conv2d, or Conv1D of transformers.
    values
        Of the shape of ``module.weight``: the weight, a mask or indices.

    Returns
    -------
    Tensor
        Of shape (groups, out of a group, in of a group); one group except for grouped convolutions. Columns
        are the input features, for Conv2d in the order of `torch.nn.Unfold`.
    """
    if _is_transposed(module):
        return values.t()[None]
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return values.reshape(groups, values.shape[0] // groups, -1)


def from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Return matrices of `to_rows` as a tensor of the weight's shape."""
    shape: torch.Size = module.weight.shape  # type: ignore[assignment]
    return rows[0].t().contiguous() if _is_transposed(module) else rows.reshape(shape)


def input_columns(module: nn.Module, inputs: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return the inputs that the rows of a weight are multiplied by.

    Parameters
    ----------
    module
        Linear, Conv2d, or Conv1D of transformers.
    inputs
        The input of one forward.
    tokens
        Boolean, of shape (batch, tokens): those to look at. Ignored where the input has no such dimensions.

    Returns
    -------
    Tensor
        Of shape (groups, samples, in of a group); a sample is a token, or a place that a kernel is put on.
    """
    if not isinstance(module, nn.Conv2d):
        if tokens is not None and inputs.shape[:-1] == tokens.shape:
            inputs = inputs[tokens]
        return inputs.reshape(1, -1, inputs.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
    if padded.dim() == 3:
        padded = padded[None]
    kernel: Any = module.kernel_size
    patches = F.unfold(padded, kernel, module.dilation, 0, module.stride)
    return patches.unflatten(1, (module.groups, -1)).transpose(0, 1).transpose(2, 3).flatten(1, 2)


@dataclass
class InputStatistics:
    """Sums over the inputs of one layer.

    Attributes
    ----------
    squares
        Sum of squares of every input feature, of shape (groups, in of a group), float32 or wider.
    gram
        Sum of outer products ``x x^T``, of shape (groups, in, in); None if only squares are gathered.
    samples
        How many inputs ``x`` were seen.
    """

    squares: Tensor
    gram: Tensor | None
    samples: int = 0

    def add(self, columns: Tensor) -> None:
        """Add inputs of shape (groups, samples, in of a group)."""
        columns = columns.to(self.squares.dtype)
        self.samples += columns.shape[1]
        if self.gram is None:
            self.squares += columns.square().sum(1)
        else:
            self.gram.baddbmm_(columns.transpose(1, 2), columns)
            self.squares = self.gram.diagonal(dim1=1, dim2=2)


class InputWatcher:
    """Context manager that gathers `InputStatistics` of layers from the forwards within it.

    Parameters
    ----------
    layers
        The layers by name: Linear, Conv2d, or Conv1D of transformers.
    gram
        Whether to gather Gram matrices, which take ``in * in`` numbers a layer, or squares alone.

    Attributes
    ----------
    tokens
        Boolean, of shape (batch, tokens): the tokens of the next forward that count; None for all of them.
    statistics
        By the names of layers; a layer that saw no input is missing.

    Examples
    --------
    >>> with InputWatcher({"fc": model.fc}) as watcher, torch.no_grad():
    ...     for images, _ in loader:
    ...         model(images)
    >>> importance = wanda(model.fc.weight, watcher.statistics["fc"].squares[0])
    """

    def __init__(self, layers: Mapping[str, nn.Module], gram: bool = False) -> None:
        self.layers = layers
        self.gram = gram
        self.tokens: Tensor | None = None
        self.statistics: dict[str, InputStatistics] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputWatcher:
        for name, module in self.layers.items():

            def see(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                self._see(name, module, args[0])

            self._handles.append(module.register_forward_pre_hook(see))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        columns = input_columns(module, inputs.detach(), self.tokens)
        if name not in self.statistics:
            groups, _, features = columns.shape
            dtype = torch.promote_types(columns.dtype, torch.float32)
            squares = torch.zeros(groups, features, dtype=dtype, device=columns.device)
            gram = squares.new_zeros(groups, features, features) if self.gram else None
            self.statistics[name] = InputStatistics(squares, gram)
        self.statistics[name].add(columns)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a layer is Conv1D of transformers, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
