"""Targets of a search block by block: which weights may be swapped, and which have a separate scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_jackpot.errors import SearchDivergedError, TargetWithoutParametersError
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.search.blockwise.scores import ScoreTraining
from nni_jackpot.search.blockwise.targets import Target, by_block, row_groups, targets_of

PLACES = torch.arange(24).view(3, 8)


@pytest.mark.parametrize(
    ("grains", "groups"),
    [
        (Grains((3, 8)), [list(range(8))]),  # one budget for all rows
        (Grains((3, 8), rows=3), [list(range(8))]),
        (Grains((3, 8), rows=6), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Grains((3, 8), rows=8, row_dim=0), [[i] for i in range(8)]),  # columns keep numbers of their own
        (Grains((3, 8), rows=4), None),  # rows of six weights, which begin in the middle
    ],
)
def test_weights_of_a_row_are_swapped_where_counts_stay(
    grains: Grains, groups: list[list[int]] | None
) -> None:
    found = row_groups(Target(grains, 12), PLACES)
    assert (None if found is None else found.tolist()) == groups


def test_an_output_feature_has_a_scale_if_it_keeps_a_number_of_its_own() -> None:
    assert Target(Grains((3, 8), rows=3), 12).scale_dims == (1,)
    assert Target(Grains((3, 8), rows=6), 12).scale_dims == (1,)
    assert Target(Grains((8, 3), rows=6, row_dim=0), 12, output_dim=1).scale_dims == (0,)
    assert Target(Grains((3, 8)), 12).scale_dims == (0, 1)


def test_every_target_is_in_a_block() -> None:
    targets = {"a.0.weight": Target(Grains((2, 2)), 2), "b.weight": Target(Grains((2, 2)), 2)}
    assert [list(found) for found in by_block(["b", "a.0"], targets)] == [["weight"], ["weight"]]
    with pytest.raises(TargetWithoutParametersError, match=r"a\.0\.weight is in none of the blocks b"):
        by_block(["b"], targets)


def test_layers_that_a_pattern_does_not_fit_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    assert list(targets_of(model, ["0", "1"], "2:4")) == ["0.weight"]
    with pytest.raises(TargetWithoutParametersError, match="2:4"):
        targets_of(model, ["1"], "2:4")


def test_scores_follow_the_straight_through_gradient_of_every_row() -> None:
    """The first step, by hand: products of gradient and weight, of size 1 in every row."""
    torch.manual_seed(0)
    weight, factors = torch.randn(3, 8), torch.randn(3, 8)
    target = Target(Grains((3, 8), rows=3), 12)
    scores = torch.rand(3, 8) * torch.tensor([[1.0], [10.0], [0.1]])
    kept = target.select(scores)
    training = ScoreTraining(
        {"w": weight}, {"w": target}, {"w": kept}, {"w": scores}, lr=0.5, momentum=0.0, steps=1
    )
    masked = training.masked()["w"]
    assert torch.equal(masked, weight * kept)
    training.step((masked * factors).sum())
    products = weight * factors
    expected = scores / scores.mean(1, keepdim=True)
    expected -= 0.5 * products / products.square().mean(1, keepdim=True).sqrt()
    assert torch.equal(training.kept["w"], target.select(expected, kept))


def test_a_loss_that_is_not_finite_ends_the_search() -> None:
    weight, target = torch.ones(1, 4), Target(Grains((1, 4)), 2)
    training = ScoreTraining(
        {"w": weight}, {"w": target}, {"w": weight > 0}, {"w": weight}, lr=0.5, momentum=0.0, steps=1
    )
    with pytest.raises(SearchDivergedError, match="nan"):
        training.step(training.masked()["w"].sum() * torch.nan)
