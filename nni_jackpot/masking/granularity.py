"""What one score stands for: a single weight, a channel or a block, and how these share out the zeros."""

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
    """The grains of a target: the sets of weights that are kept or pruned as one, each with one score.

    Parameters
    ----------
    shape
        Shape of the target.
    scaler
        NNI's scaling of the target's ``granularity``; None makes every weight a grain of its own.
    rows
        The grains fall into so many rows of equal length, each of which keeps the same number
        (``internal_metric_block``, or the groups of an N:M pattern).
    row_dim
        Dimension along which the rows run; None for rows in memory order.
    """

    shape: tuple[int, ...]
    scaler: Scaling | None = None
    rows: int = 1
    row_dim: int | None = None

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Shape of the scores: that of the target, reduced dimensions kept as 1."""
        if self.scaler is None:
            return self.shape
        kernel = self.scaler.kernel_size
        fill = [self.scaler.kernel_padding_val] * (len(self.shape) - len(kernel))
        kernel = [*fill, *kernel] if self.scaler.kernel_padding_mode == "front" else [*kernel, *fill]
        return tuple(1 if step == -1 else size // step for size, step in zip(self.shape, kernel, strict=True))

    @property
    def count(self) -> int:
        """How many grains there are."""
        return math.prod(self.score_shape)

    @property
    def size(self) -> int:
        """How many weights a grain has."""
        return math.prod(self.shape) // max(1, self.count)

    @property
    def are_rows(self) -> bool:
        """Whether a mask of the target's shape, looked at as rows, is that of the grains."""
        return self.scaler is None and self.row_dim is None

    def reduce(self, weights: Tensor, how: Reduce) -> Tensor:
        """Reduce a tensor of the target's shape to one of the scores' shape, over the last dimension."""
        return weights if self.scaler is None else self.scaler.shrink(weights, how, keepdim=True)

    def of_mask(self, mask: Tensor) -> Tensor:
        """Return which grains a mask of the target's shape keeps, boolean, of the scores' shape."""
        return self.reduce(mask, lambda weights: weights[..., 0]).bool()

    def expand(self, grains: Tensor) -> Tensor:
        """Give every weight the value of its grain: of the target's shape, or broadcastable to it."""
        if self.scaler is None:
            return grains
        return self.scaler.expand(grains, list(self.shape), keepdim=True, full_expand=False)

    def select(self, scores: Tensor, keep: int, previous: Tensor | None = None) -> Tensor:
        """Select the ``keep`` grains of largest score (Eq. 5), as many in every row; boolean.

        Ties are decided as in `nni_jackpot.masking.topk.keep_top`.
        """
        if self.rows == 1:
            return keep_top(scores, keep, previous)
        before = None if previous is None else self.by_row(previous)
        return self.of_rows(keep_top_by_row(self.by_row(scores), keep // self.rows, before))

    def by_row(self, values: Tensor) -> Tensor:
        """Return a tensor of the scores' shape as one of shape (rows, grains of a row)."""
        across = values if self.row_dim is None else values.movedim(self.row_dim, -1)
        return across.reshape(self.rows, -1)

    def of_rows(self, values: Tensor) -> Tensor:
        """Return a tensor of shape (rows, grains of a row) as one of the scores' shape."""
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
        If it is not of the form ``"N:M"`` with 0 < N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigListError(f"sparse_pattern must be 'N:M' with 0 < N < M, such as '2:4', got {pattern!r}")
    return int(match[1]), int(match[2])
