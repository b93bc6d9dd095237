"""Top-k of very many short rows, as N:M sparsity has them, by comparing all pairs of a row."""

from __future__ import annotations

import torch
from torch import Tensor

# Longest rows for which comparing all pairs is faster than a selection row by row.
LONGEST = 8


def keep_in_short_rows(scores: Tensor, keep: int, previous: Tensor | None) -> Tensor:
    """Select the ``keep`` largest scores of every row; as `nni_jackpot.masking.topk.keep_top_by_row`.

    The time is that of ``n * (n - 1) / 2`` comparisons of contiguous columns.
    """
    columns = [column.contiguous() for column in scores.unbind(1)]
    stayers = None if previous is None else [column.contiguous() for column in previous.unbind(1)]
    # How many scores of its row come before each score.
    ranks = torch.zeros(len(columns), len(scores), dtype=torch.int8, device=scores.device)
    for i, low in enumerate(columns):
        for j in range(i + 1, len(columns)):
            comes_first = columns[j] > low
            if stayers is not None:
                comes_first |= (columns[j] == low).logical_and_(stayers[j]).logical_and_(~stayers[i])
            ranks[i] += comes_first
            ranks[j] += comes_first.logical_not_()
    return (ranks < keep).t().contiguous()
