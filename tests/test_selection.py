from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Generator, Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.selection import keep_top, keep_top_by_row, swap_at_most

SCORES = {
    "distinct": lambda g: torch.rand(40, generator=g),
    "three values": lambda g: torch.randint(3, (40,), generator=g).float(),
    "all equal": lambda g: torch.full((40,), 0.95),
    "two values": lambda g: torch.where(torch.rand(40, generator=g) > 0.9, 1.0, 0.95),
    "sorted": lambda g: torch.arange(40.0),
    "denormal": lambda g: torch.rand(40, generator=g) * 1e-42,
    "outliers": lambda g: torch.tensor([1e38, -1e38, 0.0, -0.0] * 10),
    "infinite": lambda g: torch.tensor([inf, -inf, 1.0, inf, -0.0, 0.0, -inf, 3e38] * 5),
    "bfloat16": lambda g: torch.rand(40, generator=g).bfloat16(),
    "double": lambda g: 1 + torch.rand(40, generator=g).double() * 1e-14,
}
every_kind = pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)


def reference(scores: Tensor, keep: int, previous: Tensor) -> Tensor:
    """The rule spelled out: higher score first, then kept before, then lower index."""
    flat, before = scores.flatten().tolist(), previous.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], not before[i], i))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:keep]] = True
    return kept.view_as(scores)


def coin(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) > 0.5


@every_kind
def test_it_keeps_exactly_the_top(make) -> None:
    generator = Generator().manual_seed(0)
    for keep in (0, 1, 7, 20, 39, 40):
        scores = make(generator).reshape(4, 10)
        previous = coin(generator, 4, 10)
        kept = keep_top(scores, keep, previous)
        assert kept.dtype == torch.bool
        assert int(kept.sum()) == keep
        assert torch.equal(kept, reference(scores, keep, previous))


def test_ties_keep_the_lower_index_where_nothing_was_kept_before() -> None:
    assert keep_top(torch.ones(5), 2).tolist() == [True, True, False, False, False]


def test_ties_leave_the_kept_set_as_it_was() -> None:
    previous = torch.tensor([False, True, False, True, True])
    assert torch.equal(keep_top(torch.ones(5), 3, previous), previous)


def test_memory_order_does_not_matter() -> None:
    generator = Generator().manual_seed(0)
    scores = torch.randint(3, (6, 5), generator=generator).float()
    previous = coin(generator, 6, 5)
    for keep in range(31):
        expected = reference(scores, keep, previous)
        found = keep_top(scores.t().contiguous().t(), keep, previous.t().contiguous().t())
        assert torch.equal(found, expected)


def test_scores_that_take_gradients_give_a_mask_without() -> None:
    scores = torch.rand(3, 4, requires_grad=True)
    before = torch.zeros(3, 4, dtype=torch.bool)
    before[:, 0] = True
    for keep in range(13):
        assert not keep_top(scores, keep).requires_grad
    for keep in range(5):
        assert not keep_top_by_row(scores, keep).requires_grad
    assert not swap_at_most(keep_top(scores, 3), before, scores, 1).requires_grad


def test_nan_is_an_error_at_any_place() -> None:
    for position in range(4):
        scores = torch.tensor([1.0, 1.0, 1.0, 0.5])
        scores[position] = nan
        for keep in range(5):
            with pytest.raises(SearchDivergedError, match="NaN"):
                keep_top(scores, keep)
        for keep in range(3):
            with pytest.raises(SearchDivergedError, match="NaN"):
                keep_top_by_row(scores.view(2, 2), keep)


@pytest.mark.parametrize("keep", [-1, 6])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(ValueError, match="between 0 and the 5 scores"):
        keep_top(torch.ones(5), keep)
    with pytest.raises(ValueError, match="between 0 and the 5 scores"):
        keep_top_by_row(torch.ones(2, 5), keep)


def test_no_scores() -> None:
    assert keep_top(torch.ones(0), 0).shape == (0,)
    assert keep_top_by_row(torch.ones(0, 4), 2).shape == (0, 4)
    assert keep_top_by_row(torch.ones(3, 0), 0).shape == (3, 0)


@every_kind
@pytest.mark.parametrize("n", [1, 4, 10, 40])
def test_every_row_keeps_its_own_top(make, n: int) -> None:
    generator = Generator().manual_seed(0)
    for keep in {0, 1, n // 2, n - 1, n}:
        scores, previous = make(generator).reshape(-1, n), coin(generator, 40 // n, n)
        kept = keep_top_by_row(scores, keep, previous)
        assert kept.dtype == torch.bool
        expected = [reference(*row) for row in zip(scores, [keep] * len(scores), previous, strict=True)]
        assert torch.equal(kept, torch.stack(expected))
        nothing = torch.zeros_like(previous)
        assert torch.equal(keep_top_by_row(scores, keep), keep_top_by_row(scores, keep, nothing))


def test_rows_may_run_across_memory() -> None:
    generator = Generator().manual_seed(0)
    scores = torch.randint(3, (4, 100), generator=generator).float().t()
    previous = coin(generator, 4, 100).t()
    for keep in range(5):
        expected = keep_top_by_row(scores.contiguous(), keep, previous.contiguous())
        assert torch.equal(keep_top_by_row(scores, keep, previous), expected)


def test_one_row_is_like_no_rows() -> None:
    generator = Generator().manual_seed(0)
    scores, previous = torch.randint(9, (5000,), generator=generator).float(), coin(generator, 5000)
    for keep in (1, 123, 2500, 4999):
        by_row = keep_top_by_row(scores[None], keep, previous[None])[0]
        assert torch.equal(by_row, keep_top(scores, keep, previous))


def swap_reference(kept: Tensor, before: Tensor, scores: Tensor, limit: int) -> Tensor:
    """The rule spelled out: the best of those that would enter, the worst of those that would leave."""
    flat, to, start = scores.flatten().tolist(), kept.flatten().tolist(), before.flatten().tolist()
    entrants = sorted((i for i in range(len(flat)) if to[i] and not start[i]), key=lambda i: (-flat[i], i))
    leavers = sorted((i for i in range(len(flat)) if start[i] and not to[i]), key=lambda i: (flat[i], i))
    result = before.flatten().clone()
    result[entrants[:limit]] = True
    result[leavers[:limit]] = False
    return result.view_as(before)


@every_kind
def test_no_more_swaps_than_allowed(make) -> None:
    generator = Generator().manual_seed(0)
    for _ in range(10):
        scores, before = make(generator).reshape(4, 10), coin(generator, 4, 10)
        kept = keep_top(scores, int(before.sum()), before)
        wanted = int((kept & ~before).sum())
        for limit in {0, 1, 2, 5, wanted, 100}:
            swapped = swap_at_most(kept, before, scores, limit)
            assert torch.equal(swapped, swap_reference(kept, before, scores, limit))
            assert int(swapped.sum()) == int(before.sum())
            assert int((swapped & ~before).sum()) == min(limit, wanted)


def test_swaps_lead_to_the_mask_that_the_scores_ask_for() -> None:
    scores = torch.arange(10.0)
    mask = torch.arange(10) < 4
    for _ in range(4):
        mask = swap_at_most(keep_top(scores, 4, mask), mask, scores, 1)
    assert torch.equal(mask, torch.arange(10) >= 6)


def test_limit_of_swaps_must_not_be_negative() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="limit must not be negative"):
        swap_at_most(mask, mask, torch.ones(3), -1)
