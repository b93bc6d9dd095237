"""Example inputs of a model: a tensor, or tensors nested in tuples, lists and dicts."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from nni_jackpot.errors import SpeedupError

# A tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Arguments may be nested.
# If a list or dict is the model's only argument, it may also be given directly.
Inputs: TypeAlias = Any


class Call(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Inputs) -> Call:
        """Return the call with these inputs, for any model."""
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})

    @classmethod
    def to(cls, model: nn.Module, inputs: Inputs) -> Call:
        """Return the call with these inputs for ``model``, which may take a list or a dict as one argument.

        Raises
        ------
        SpeedupError
            If the model's forward does not accept the inputs, or they contain no tensor.
        """
        call = cls.of(inputs)
        if not call.tensors():
            raise SpeedupError("the example input contains no tensor: give the arguments of the model")
        try:
            signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # a compiled model has no signature
            return call
        for candidate in (call,) if isinstance(inputs, tuple) else (call, cls((inputs,), {})):
            try:
                signature.bind(*candidate.args, **candidate.kwargs)
            except TypeError as error:
                reason = error
            else:
                return candidate
        takes = ", ".join(signature.parameters)
        raise SpeedupError(f"the example input does not fit the model's forward({takes}): {reason}")

    @property
    def inputs(self) -> Inputs:
        """The inputs that `to` makes this call of, for the model that it was made for."""
        return self.kwargs if self.kwargs and not self.args else self.args

    def on(self, device: torch.device | str) -> Call:
        """Return a call with copies of the tensors on a device; the model may change the copies."""
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), self)

    def twice(self) -> tuple[Call, Call]:
        """Return the call with its batch doubled, and that call with dynamic shapes in place of its tensors.

        The batch is the first dimension of the tensors that share the most common first size.
        """
        sizes = Counter(tensor.shape[0] for tensor in self.tensors() if tensor.ndim)
        rows = max(sizes, key=lambda size: sizes[size], default=None)
        batch = torch.export.Dim("batch")

        def has_rows(leaf: Any) -> bool:
            return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows

        return (
            tree_map(lambda leaf: torch.cat([leaf, leaf]) if has_rows(leaf) else leaf, self),
            tree_map(lambda leaf: {0: batch} if has_rows(leaf) else None, self),
        )

    def shapes_for(self, model: nn.Module) -> dict[str, Any]:
        """Return dynamic shapes by the names of a model's arguments, as ``torch.export`` wants them."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in nesting order."""
        return [leaf for leaf in tree_leaves(self) if isinstance(leaf, Tensor)]
