"""Grains: sets of weights that share one score, such as a single weight, a channel or a block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nni_jackpot.errors import ConfigListError
from nni_jackpot.masking.topk import keep_top, keep_top_by_row

if TYPE_CHECKING:
    from nni.compression.utils.scaling import Scaling

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grains:
    """The grains of a target: sets of weights that are kept or pruned together, with one score each.

    Parameters
    ----------
    shape
        Shape of the target.
    scaler
        NNI's scaling of the target's ``granularity``; None if every weight is a grain.
    rows
        Number of rows of equal length into which the grains are divided; each row keeps the same number of
        grains (``internal_metric_block``, or the groups of an N:M pattern).
    row_dim
        Dimension along which the rows run; None for rows in memory order.
    """

    shape: tuple[int, ...]
    scaler: Scaling | None = None
    rows: int = 1
    row_dim: int | None = None

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Shape of the scores: the target's shape with every dimension reduced to its number of blocks."""
        if self.scaler is None:
            return self.shape
        kernel = self.scaler.kernel_size
        fill = [self.scaler.kernel_padding_val] * (len(self.shape) - len(kernel))
        kernel = [*fill, *kernel] if self.scaler.kernel_padding_mode == "front" else [*kernel, *fill]
        return tuple(1 if step == -1 else size // step for size, step in zip(self.shape, kernel, strict=True))

    @property
    def count(self) -> int:
        """Number of grains."""
        return math.prod(self.score_shape)

    @property
    def size(self) -> int:
        """Number of weights per grain."""
        return math.prod(self.shape) // max(1, self.count)

    @property
    def are_rows(self) -> bool:
        """Whether a mask of the target's shape can be viewed as the rows of grains."""
        return self.scaler is None and self.row_dim is None

    def reduce(self, weights: Tensor, how: Reduce) -> Tensor:
        """Reduce a tensor of the target's shape to one of the scores' shape, over the last dimension."""
        return weights if self.scaler is None else self.scaler.shrink(weights, how, keepdim=True)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Return the grains that a mask of the target's shape keeps, boolean, in the scores' shape."""
        return self.reduce(mask, lambda weights: weights[..., 0]).bool()

    def expand(self, grains: Tensor) -> Tensor:
        """Return the value of each weight's grain, in the target's shape or broadcastable to it."""
        if self.scaler is None:
            return grains
        return self.scaler.expand(grains, list(self.shape), keepdim=True, full_expand=False)

    def select(self, scores: Tensor, keep: int, previous: Tensor | None = None) -> Tensor:
        """Select the ``keep`` grains with the largest scores (Eq. 5), equally many per row; boolean.

        Ties are broken as in `nni_jackpot.masking.topk.keep_top`.
        """
        if self.rows == 1:
            return keep_top(scores, keep, previous)
        before = None if previous is None else self.by_row(previous)
        return self.of_rows(keep_top_by_row(self.by_row(scores), keep // self.rows, before))

    def by_row(self, values: Tensor) -> Tensor:
        """Reshape a tensor from the scores' shape to (rows, grains per row)."""
        across = values if self.row_dim is None else values.movedim(self.row_dim, -1)
        return across.reshape(self.rows, -1)

    def of_rows(self, values: Tensor) -> Tensor:
        """Reshape a tensor from (rows, grains per row) to the scores' shape."""
        if self.row_dim is None:
            return values.reshape(self.score_shape)
        shape = list(self.score_shape)
        shape.append(shape.pop(self.row_dim))
        return values.reshape(shape).movedim(-1, self.row_dim)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return N and M of a ``sparse_pattern``.

    Raises
    ------
    ConfigListError
        If the pattern does not have the form ``"N:M"`` with 0 < N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigListError(f"sparse_pattern must be 'N:M' with 0 < N < M, such as '2:4', got {pattern!r}")
    return int(match[1]), int(match[2])
