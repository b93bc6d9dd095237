"""What layers see: sums over their inputs, gathered by forward hooks, for criteria that need activations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_jackpot.errors import CalibrationError
from nni_jackpot.masking.activations.layers import (
    first_tensor,
    from_rows,
    input_columns,
    matrix_shape,
    to_rows,
)
from nni_jackpot.runtime.distributed import all_reduce_sum

K = TypeVar("K", bound=Hashable)


@dataclass
class InputStatistics:
    """Sums over the inputs of one layer.

    Attributes
    ----------
    layer
        The layer: Linear, Conv1d, Conv2d, Conv3d, or Conv1D of transformers.
    squares
        Sum of squares of every input feature, of shape (groups, in of a group), float32 or wider.
    gram
        Sum of outer products ``x x^T``, of shape (groups, in, in); None if only squares are gathered.
    samples
        How many inputs ``x`` were seen.
    """

    layer: nn.Module
    squares: Tensor
    gram: Tensor | None
    samples: int = 0

    @classmethod
    def empty(cls, layer: nn.Module, like: Tensor, gram: bool) -> InputStatistics:
        """Return statistics of no inputs.

        Parameters
        ----------
        layer
            The layer.
        like
            A tensor on the device and of the dtype of the inputs; half precision is summed in float32.
        gram
            Whether there is a Gram matrix.
        """
        groups, features = matrix_shape(layer)
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (groups, features, features) if gram else (groups, features)
        sums = torch.zeros(shape, dtype=dtype, device=like.device)
        return cls(layer, sums.diagonal(dim1=1, dim2=2), sums) if gram else cls(layer, sums, None)

    def rows(self, values: Tensor) -> Tensor:
        """Return a tensor of the weight's shape with one row for each output feature.

        Returns
        -------
        Tensor
            Of shape (groups, out of a group, in of a group): the columns are the features of ``squares``.
        """
        return to_rows(self.layer, values)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return rows as a tensor of the weight's shape."""
        return from_rows(self.layer, rows)

    def add(self, columns: Tensor) -> None:
        """Add inputs of shape (groups, samples, in of a group)."""
        columns = columns.to(self.squares.dtype)
        self.samples += columns.shape[1]
        if self.gram is None:
            self.squares += columns.square().sum(1)
        else:
            self.gram.baddbmm_(columns.transpose(1, 2), columns)  # squares are its diagonal

    def add_other_ranks(self) -> None:
        """Add what the other processes of `torch.distributed` have seen."""
        samples = torch.tensor(self.samples, device=self.squares.device)
        all_reduce_sum((samples, self.squares if self.gram is None else self.gram))
        self.samples = int(samples)


Inputs: TypeAlias = Iterable[tuple[Hashable, InputStatistics]]
"""Evidence of the inputs: the key of every weight, and the statistics of the inputs of its layer."""


class InputWatcher(Generic[K]):
    """Context manager that gathers `InputStatistics` of layers from the forwards within it.

    Parameters
    ----------
    layers
        The layers by key: Linear, Conv1d, Conv2d, Conv3d, or Conv1D of transformers. Several layers of one
        key share a weight; the inputs of all count.
    gram
        Whether to gather Gram matrices, which take ``in * in`` numbers a layer, or squares alone.
    training_only
        Whether only forwards with gradients enabled count, so that evaluations within a training loop do not.

    Attributes
    ----------
    tokens
        Boolean, of shape (batch, tokens): the tokens of the next forward that count; None for all of them.
    statistics
        By the keys of layers; a layer that saw no input is missing.

    Examples
    --------
    >>> with InputWatcher({"fc": model.fc}) as watcher, torch.no_grad():
    ...     for images, _ in loader:
    ...         model(images)
    >>> importance = wanda(model.fc.weight, watcher.statistics["fc"].squares[0])
    """

    def __init__(
        self,
        layers: Mapping[K, nn.Module | Sequence[nn.Module]],
        gram: bool = False,
        training_only: bool = False,
    ) -> None:
        self.layers = layers
        self.gram = gram
        self.training_only = training_only
        self.tokens: Tensor | None = None
        self.statistics: dict[K, InputStatistics] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputWatcher[K]:
        for key, layers in self.layers.items():

            def see(module: nn.Module, args: Any, kwargs: dict[str, Any], key: K = key) -> None:
                self._see(key, module, first_tensor(args, kwargs))

            for module in [layers] if isinstance(layers, nn.Module) else layers:
                self._handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Gather nothing from later forwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, key: K, module: nn.Module, inputs: Tensor | None) -> None:
        if inputs is None or (self.training_only and not torch.is_grad_enabled()):
            return
        with torch.no_grad():
            for columns in input_columns(module, inputs.detach(), self.tokens):
                if key not in self.statistics:
                    self.statistics[key] = InputStatistics.empty(module, columns, self.gram)
                self.statistics[key].add(columns)


@dataclass(frozen=True)
class CollectedInputs(Generic[K]):
    """The statistics of the inputs of layers, from forwards that are run when they are iterated over.

    Squares of all layers take one run. Gram matrices take ``in * in`` numbers each: a run gathers the next
    layers whose matrices together take no more numbers than all the weights, and one layer at least.

    Parameters
    ----------
    weights
        The weights by key, in the same order on every rank.
    layers
        The layers of every weight, as for `InputWatcher`.
    run
        Runs the forwards, the same each time. It is given the watcher, to stop it before other forwards.
    gram
        Whether to gather Gram matrices.

    Raises
    ------
    CalibrationError
        On iteration, if a layer has seen no input.
    """

    weights: Mapping[K, Tensor]
    layers: Mapping[K, Sequence[nn.Module]]
    run: Callable[[InputWatcher[K]], None]
    gram: bool

    def __iter__(self) -> Iterator[tuple[K, InputStatistics]]:
        for keys in self._runs():
            parts = {key: self.layers[key] for key in keys}
            with InputWatcher(parts, self.gram, training_only=True) as watcher:
                self.run(watcher)
            for key in keys:
                found = watcher.statistics.pop(key, None)
                if found is None:
                    found = InputStatistics.empty(self.layers[key][0], self.weights[key], self.gram)
                found.add_other_ranks()
                if not found.samples:
                    raise CalibrationError(
                        f"the calibration batches do not reach the layer of {key}, or its weight is read "
                        "without a call of the layer: give the criterion more batches (init_batches), "
                        "exclude the layer, or start from 'magnitude'"
                    )
                yield key, found

    def _runs(self) -> list[list[K]]:
        """Return the keys of the layers of every run."""
        if not self.gram:
            return [list(self.weights)]
        most = sum(weight.numel() for weight in self.weights.values())
        runs: list[list[K]] = []
        room = 0
        for key in self.weights:
            groups, inputs = matrix_shape(self.layers[key][0])
            if not runs or groups * inputs**2 > room:
                runs.append([])
                room = most
            runs[-1].append(key)
            room -= groups * inputs**2
        return runs
