"""Swaps by the Gram matrix: exact, monotone, and with the counts of the mask they start from."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nni_jackpot.masking.activations.swaps import (
    benefit_of_keeping,
    swap_in_groups,
    swap_in_rows,
)
from nni_jackpot.masking.topk import keep_top_by_row


def layer(out: int, features: int) -> tuple[Tensor, Tensor]:
    """Return a weight, and correlated inputs of shape (features, samples)."""
    torch.manual_seed(0)
    mixed = torch.randn(features, features) / features**0.5 + torch.eye(features)
    return torch.randn(out, features), mixed @ torch.randn(features, 200) * torch.rand(features, 1).add(0.1)


def by_hand(weight: Tensor, kept: Tensor, inputs: Tensor) -> Tensor:
    return (weight @ inputs - (weight * kept) @ inputs).double().square().sum(1)


def two_of_four(weight: Tensor) -> Tensor:
    return keep_top_by_row(weight.abs().reshape(-1, 4), 2).view_as(weight)


@pytest.mark.parametrize("groups", [torch.arange(32).view(-1, 4), torch.arange(32).view(4, 8).t()])
def test_swaps_in_groups_lower_the_error_and_keep_the_counts(groups: Tensor) -> None:
    weight, inputs = layer(12, 32)
    gram = inputs @ inputs.T
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[:, groups[:, :2].flatten()] = True
    errors = [by_hand(weight, kept, inputs)]
    for sweeps in (1, 2, 20):
        better = swap_in_groups(weight, kept, gram, groups, max_sweeps=sweeps)
        assert (better[:, groups].sum(2) == 2).all()
        errors.append(by_hand(weight, better, inputs))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.9 * errors[0].sum()


def test_no_single_swap_within_a_group_is_left() -> None:
    weight, inputs = layer(5, 16)
    kept = swap_in_groups(
        weight, two_of_four(weight), inputs @ inputs.T, torch.arange(16).view(-1, 4), max_sweeps=100
    )
    error = by_hand(weight, kept, inputs)
    for row in range(5):
        for a in range(16):
            for b in range(a + 1, a // 4 * 4 + 4):
                if kept[row, a] != kept[row, b]:
                    other = kept.clone()
                    other[row, [a, b]] = kept[row, [b, a]]
                    assert by_hand(weight, other, inputs)[row] >= error[row] * (1 - 1e-4)


def test_swaps_in_rows_lower_the_error_step_by_step_and_keep_the_counts() -> None:
    weight, inputs = layer(12, 32)
    gram = inputs @ inputs.T
    kept = torch.rand(12, 32).argsort(1) < torch.arange(12)[:, None] * 3  # rows of none to nearly all
    before = by_hand(weight, kept, inputs)
    for swaps in (1, 2, 8, 100):
        better = swap_in_rows(weight, kept, gram, max_swaps=swaps)
        assert torch.equal(better.sum(1), kept.sum(1))
        after = by_hand(weight, better, inputs)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.9 * by_hand(weight, kept, inputs).sum()


def test_inputs_of_zero_change_nothing() -> None:
    weight, _ = layer(4, 8)
    kept, gram = two_of_four(weight), torch.zeros(8, 8)
    assert torch.equal(swap_in_groups(weight, kept, gram, torch.arange(8).view(-1, 4)), kept)
    assert torch.equal(swap_in_rows(weight, kept, gram), kept)


def test_the_benefit_is_the_change_of_the_error() -> None:
    weight, inputs = layer(3, 8)
    kept = two_of_four(weight)
    benefit = benefit_of_keeping(weight, kept, inputs @ inputs.T)
    for row in range(3):
        for column in range(8):
            without, with_it = kept.clone(), kept.clone()
            without[row, column], with_it[row, column] = False, True
            expected = by_hand(weight, without, inputs)[row] - by_hand(weight, with_it, inputs)[row]
            torch.testing.assert_close(benefit[row, column].double(), expected, rtol=1e-3, atol=1e-2)
