from __future__ import annotations

from math import inf, nan

import pytest
import torch
from conftest import Allocations
from torch import Generator, Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking import topk as selection
from nni_jackpot.masking.topk import (
    Threshold,
    keep_top,
    keep_top_by_row,
    swap_at_most,
    update_top,
    update_tops,
)

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
    """The rule, literally: higher score first, then previously kept, then lower index."""
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
    """The rule, literally: the best entering members and the worst leaving members."""
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


# -- updates in place


def long(make, generator: Generator, n: int) -> Tensor:
    """Scores of one kind, of any number, in blocks that differ only by chance."""
    return torch.cat([make(generator) for _ in range(-(-n // 40))])[:n]


@every_kind
@pytest.mark.parametrize("n", [39, 1000, 5003])
@pytest.mark.parametrize("few", [0, 10**6])
def test_an_update_keeps_exactly_the_top(make, n: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 512)
    monkeypatch.setattr(selection, "_FEW", few)
    generator = Generator().manual_seed(0)
    for keep in (0, 1, n // 10, n // 2, n - 1, n):
        scores, kept = long(make, generator, n), coin(generator, n)
        expected = reference(scores, keep, kept)
        changed = kept != expected
        flipped = update_top(scores, keep, kept)
        assert torch.equal(kept, expected)
        assert torch.equal(flipped.sort().values, changed.nonzero()[:, 0])


@every_kind
@pytest.mark.parametrize("few", [0, 10**6])
def test_many_updates_in_a_row(make, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last threshold is only a hint, whether scores drift, jump or stand still."""
    monkeypatch.setattr(selection, "_CHUNK", 512)
    monkeypatch.setattr(selection, "_FEW", few)
    generator = Generator().manual_seed(0)
    n, keep, threshold = 3000, 300, Threshold()
    scores = long(make, generator, n)
    kept = keep_top(scores, keep)
    for step in range(30):
        if step % 10 == 9:
            scores = long(make, generator, n)
        elif step % 4:
            scores = scores * 0.999 + 1e-4 * torch.randn(n, generator=generator).to(scores)
            scores = scores.nan_to_num(0.0)  # NaN from opposite infinities
        expected = reference(scores, keep, kept)
        update_top(scores, keep, kept, n_kept=keep, threshold=threshold)
        assert torch.equal(kept, expected), step


def test_guesses_that_miss_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_FEW", 0)
    scores = torch.rand(5000, generator=Generator().manual_seed(0))
    expected = keep_top(scores, 500)
    for miss in ((5.0, 6.0), (-6.0, -5.0)):
        monkeypatch.setattr(selection, "_bracket_of_sample", lambda *_, miss=miss: miss)
        assert torch.equal(keep_top(scores, 500), expected)
        kept = torch.arange(5000) < 500
        update_top(scores, 500, kept, threshold=Threshold(2.0, 0.5, 0.1))
        assert torch.equal(kept, expected)


def test_nan_leaves_the_set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 64)
    monkeypatch.setattr(selection, "_FEW", 0)
    scores = torch.rand(300)
    before = keep_top(scores, 30)
    for position in (0, 100, 299):
        broken = scores.clone()
        broken[position] = nan
        crowded = Threshold(0.9, 0.0, 0.1, is_crowded=True, between=float(scores[before].min()) - 1e-6)
        for threshold in (None, Threshold(0.9, 0.0, 0.1), crowded):
            kept = before.clone()
            with pytest.raises(SearchDivergedError, match="NaN"):
                update_top(broken, 30, kept, threshold=threshold)
            assert torch.equal(kept, before)


@pytest.mark.parametrize("between", [0.97, 0.95, 0.0, 1.0, 2.0, nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gap_seen_before_decides_nothing_by_itself(
    monkeypatch: pytest.MonkeyPatch, between: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 64)
    monkeypatch.setattr(selection, "_FEW", 0)
    generator = Generator().manual_seed(0)
    kept = keep_top(torch.rand(300, generator=generator), 30)
    scores = torch.where(kept, 1.0, 0.95).to(dtype)
    threshold = Threshold(0.95, 0.0, 0.1, is_crowded=True, between=between)
    before = kept.clone()
    assert not len(update_top(scores, 30, kept, n_kept=30, threshold=threshold))
    assert torch.equal(kept, before)
    for _ in range(3):  # one kept score falls below the others, and one of the others rises
        scores[kept.nonzero()[7, 0]] = 0.9
        scores[(~kept).nonzero()[150, 0]] = 0.96
        expected = reference(scores, 30, kept)
        update_top(scores, 30, kept, n_kept=30, threshold=threshold)
        assert torch.equal(kept, expected)
        threshold.is_crowded = True


def test_a_steady_update_makes_nothing_of_the_size_of_the_scores() -> None:
    n = 6_000_000
    generator = Generator().manual_seed(0)
    scores, threshold = torch.randn(n, generator=generator), Threshold()
    kept = keep_top(scores, n // 10)
    for _ in range(3):
        scores.add_(torch.randn(n, generator=generator), alpha=1e-5)
        update_top(scores, n // 10, kept, n_kept=n // 10, threshold=threshold)
    scores.mul_(0.99999)
    with Allocations() as allocations:
        flipped = update_top(scores, n // 10, kept, n_kept=n // 10, threshold=threshold)
    assert not len(flipped)  # scaling keeps the order and the ties
    assert 0 < allocations.largest < n  # less than one byte per score


@every_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_an_accelerator_finds_the_same_for_many_sets_at_once(make, rows: int) -> None:
    check_update_tops(make, rows, "cpu")


def check_update_tops(make, rows: int, device: str) -> None:
    generator = Generator().manual_seed(0)
    sets, expected = [], []
    for n, keep in ((39, 0), (39, 39), (500, 50), (500, 251), (1000, 999)):
        scores, kept = long(make, generator, rows * n).view(rows, n), coin(generator, rows, n)
        wanted = [reference(*row) for row in zip(scores, [keep] * rows, kept, strict=True)]
        expected.append(torch.stack(wanted))
        sets.append((scores.to(device), keep, kept.to(device)))
    before = [kept.clone() for _, _, kept in sets]
    changed = update_tops(sets)
    for (_, _, kept), wanted, was, flipped in zip(sets, expected, before, changed, strict=True):
        assert torch.equal(kept.cpu(), wanted)
        assert torch.equal(flipped, was != kept)
    assert update_tops([]) == []


@pytest.mark.parametrize("keep", [0, 5, 45, 50])
def test_an_accelerator_leaves_all_sets_alone_if_a_score_is_nan(keep: int) -> None:
    sets = [(torch.rand(1, 50), keep, torch.zeros(1, 50, dtype=torch.bool)) for _ in range(3)]
    sets[1][0][0, 7] = nan
    with pytest.raises(SearchDivergedError, match="NaN"):
        update_tops(sets)
    assert not any(kept.any() for _, _, kept in sets)


def test_a_crowd_of_equal_scores_is_looked_at_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 512)
    monkeypatch.setattr(selection, "_FEW", 0)
    kept = torch.arange(4000) % 10 == 0
    scores, threshold = torch.where(kept, 1.0, 0.95), Threshold()
    with monkeypatch.context() as counted:
        looks = []
        in_doubt = selection._places_in_doubt
        counted.setattr(selection, "_places_in_doubt", lambda *given: looks.append(1) or in_doubt(*given))
        for _ in range(5):
            scores.mul_(0.999)
            assert not len(update_top(scores, 400, kept, n_kept=400, threshold=threshold))
        assert len(looks) == 1
    scores[[3, 4]] = 2.0  # and then two flip
    expected = reference(scores, 400, kept)
    assert len(update_top(scores, 400, kept, n_kept=400, threshold=threshold)) == 4
    assert torch.equal(kept, expected)
    scores[7] = nan
    with pytest.raises(SearchDivergedError, match="NaN"):
        update_top(scores, 400, kept, n_kept=400, threshold=threshold)
