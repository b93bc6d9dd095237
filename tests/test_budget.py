from __future__ import annotations

import pytest
import torch

from nni_jackpot.budget import as_configured, by_global_rank, kept_count


@pytest.mark.parametrize(
    ("numel", "ratio"), [(10, 0.7), (100, 0.29), (9, 0.9), (7, 0.0), (1, 0.5), (1000, 0.999)]
)
def test_zeros_are_int_of_ratio_times_numel(numel: int, ratio: float) -> None:
    assert numel - kept_count(numel, ratio) == int(ratio * numel)


def test_as_configured() -> None:
    importance = {"a": torch.rand(2, 5), "b": torch.rand(7)}
    assert as_configured(importance, 0.5) == {"a": 5, "b": 4}


def test_global_rank_counts_the_members_of_one_ranking() -> None:
    importance = {"a": torch.tensor([1.0, 5.0, 6.0]), "b": torch.tensor([[2.0, 3.0], [4.0, 0.5]])}
    assert by_global_rank(importance, 0.5) == {"a": 2, "b": 2}  # zeros: int(0.5 * 7) = 3 of 0.5, 1, 2
    assert by_global_rank(importance, 0.8) == {"a": 2, "b": 0}


def test_global_rank_is_exact_under_ties() -> None:
    importance = {"a": torch.ones(10), "b": torch.ones(11)}
    budgets = by_global_rank(importance, 0.9)
    assert sum(budgets.values()) == 21 - int(0.9 * 21)
