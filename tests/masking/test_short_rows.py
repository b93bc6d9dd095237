"""Short rows are selected as by a plain sort."""

from __future__ import annotations

import pytest
import torch

from nni_jackpot.masking.short_rows import LONGEST
from nni_jackpot.masking.topk import keep_top_by_row


@pytest.mark.parametrize("length", [2, 3, 4, LONGEST, LONGEST + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("has_previous", [False, True])
def test_ties_go_to_the_set_kept_before_then_to_the_lower_index(
    length: int, dtype: torch.dtype, has_previous: bool
) -> None:
    torch.manual_seed(0)
    scores = torch.randint(-1, 2, (500, length)).to(dtype)
    for keep in range(length + 1):
        previous = torch.rand(500, length) < 0.5 if has_previous else None
        found = keep_top_by_row(scores, keep, previous)
        before = torch.zeros_like(scores, dtype=torch.bool) if previous is None else previous
        for row, was, kept in zip(scores.tolist(), before.tolist(), found.tolist(), strict=True):
            order = sorted(range(length), key=lambda i: (-row[i], not was[i], i))
            assert kept == [i in order[:keep] for i in range(length)]
