from __future__ import annotations

import pytest
import torch

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.selection import keep_top


def reference(scores: torch.Tensor, keep: int, previous: torch.Tensor) -> torch.Tensor:
    """The rule spelled out: higher score first, then kept before, then lower index."""
    flat, before = scores.flatten().tolist(), previous.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], not before[i], i))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:keep]] = True
    return kept.view_as(scores)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.rand(40, generator=g),
        lambda g: torch.randint(3, (40,), generator=g).float(),
        lambda g: torch.full((40,), 0.95),
        lambda g: torch.where(torch.rand(40, generator=g) > 0.9, 1.0, 0.95),
        lambda g: torch.arange(40.0),
        lambda g: torch.rand(40, generator=g) * 1e-42,
        lambda g: torch.tensor([1e38, -1e38, 0.0, -0.0] * 10),
        lambda g: torch.rand(40, generator=g).bfloat16(),
    ],
    ids=["distinct", "three values", "all equal", "two values", "sorted", "denormal", "outliers", "bfloat16"],
)
def test_it_keeps_exactly_the_top(make) -> None:
    generator = torch.Generator().manual_seed(0)
    for keep in (0, 1, 7, 20, 39, 40):
        scores = make(generator).reshape(4, 10)
        previous = torch.rand(4, 10, generator=generator) > 0.5
        kept = keep_top(scores, keep, previous)
        assert kept.dtype == torch.bool
        assert int(kept.sum()) == keep
        assert torch.equal(kept, reference(scores, keep, previous))


def test_ties_keep_the_lower_index_where_nothing_was_kept_before() -> None:
    assert keep_top(torch.ones(5), 2).tolist() == [True, True, False, False, False]


def test_ties_leave_the_kept_set_as_it_was() -> None:
    previous = torch.tensor([False, True, False, True, True])
    assert torch.equal(keep_top(torch.ones(5), 3, previous), previous)


def test_nan_is_an_error_at_any_place() -> None:
    for position in range(4):
        scores = torch.tensor([1.0, 1.0, 1.0, 0.5])
        scores[position] = float("nan")
        for keep in range(5):
            with pytest.raises(SearchDivergedError, match="NaN"):
                keep_top(scores, keep)


@pytest.mark.parametrize("keep", [-1, 6])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(ValueError, match="between 0 and the 5 scores"):
        keep_top(torch.ones(5), keep)


def test_no_scores() -> None:
    assert keep_top(torch.ones(0), 0).shape == (0,)
