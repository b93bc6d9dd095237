"""Patterns drawn at random: what training sees, and what is found has exactly N of every M weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, dense_of, frozen, make_evaluator, same
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, Patterns
from nni_jackpot.errors import ConfigListError
from nni_jackpot.masking.masked_parameter import MaskedParameter

PATTERNS = ["1:2", "2:4", "3:4", "1:5", "4:8"]


def linear(pattern: str) -> tuple[nn.Linear, MaskedParameter]:
    """Return a wrapped layer of 40 inputs and 6 outputs, and its target."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 6, bias=False, dtype=torch.float64)
    config = [{"op_types": ["Linear"], "sparse_pattern": pattern}]
    pruner = LotteryJackpotPruner(nn.Sequential(layer), config, method="patterns")
    return layer, pruner._targets.parameters[0]


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weights that a forward has, which is given all unit vectors."""
    return layer(torch.eye(40, dtype=torch.float64)).T.contiguous()


def sample_of(layer: nn.Module, target: MaskedParameter) -> Tensor:
    return (weight_of(layer) / target.weight).detach()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_samples_are_soft_and_keep_n_of_every_m(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    layer, target = linear(pattern)
    with torch.no_grad():
        target.score.copy_(torch.randn(target.score.shape, dtype=torch.float64))
    first, second = sample_of(layer, target), sample_of(layer, target)
    for sample in (first, second):
        assert sample.min() >= -1e-9
        assert sample.max() <= 1 + 1e-9
        torch.testing.assert_close(sample.view(-1, m).sum(1), torch.full((240 // m,), float(n)).double())
    assert not torch.equal(first, second)


def test_the_strongest_pattern_has_the_probability_of_its_logit() -> None:
    """By the Gumbel-max trick the largest weight in a sample of 1:M is drawn by the softmax of the scores."""
    layer, target = linear("1:2")
    with torch.no_grad():
        target.score.copy_(torch.tensor([0.5, -0.5], dtype=torch.float64).repeat(6, 20))
    draws = 200
    wins = sum((sample_of(layer, target).view(-1, 2).argmax(1) == 0).double().mean() for _ in range(draws))
    expected = torch.sigmoid(torch.tensor(1.0)).item()
    deviation = (expected * (1 - expected) / (120 * draws)) ** 0.5
    assert float(wins) / draws == pytest.approx(expected, abs=5 * deviation)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outside_training_the_mask_is_exact(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    layer, target = linear(pattern)
    with torch.no_grad():
        target.score.copy_(torch.randn(target.score.shape, dtype=torch.float64))
    seen = weight_of(layer.eval()) != 0
    best = target.score.detach().view(-1, m).topk(n, dim=1).indices
    assert torch.equal(seen.view(-1, m), torch.zeros(240 // m, m, dtype=torch.bool).scatter_(1, best, True))


def test_the_gradient_is_that_of_the_expected_mask() -> None:
    """Of 1:2 the kept share is a sigmoid of the difference of scores and noise."""
    layer, target = linear("1:2")
    weight_of(layer).sum().backward()
    gradient = target.score.grad
    assert gradient is not None
    torch.testing.assert_close(gradient.view(-1, 2).sum(1), torch.zeros(120, dtype=torch.float64))
    difference = (target.weight.view(-1, 2)[:, 0] - target.weight.view(-1, 2)[:, 1]).sign()
    assert torch.equal(gradient.view(-1, 2)[:, 0].sign(), difference)


def test_a_search_ends_with_exact_masks(batches: Batches) -> None:
    config: list[dict[str, Any]] = [{"op_names": ["conv2"], "sparse_pattern": "2:4"}]

    def found() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = ConvNet()
        dense = dense_of(model)
        evaluator = make_evaluator(model, batches)
        pruner = LotteryJackpotPruner(model, config, evaluator, method=Patterns(lr=0.2))
        start = pruner.get_masks()
        _, masks = pruner.compress(12, None)
        assert frozen(model, dense)
        return start, masks

    start, masks = found()
    assert not same(start, masks)
    assert (masks["conv2"]["weight"].movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    assert same(masks, found()[1])


@pytest.mark.parametrize("entry", [{"sparse_ratio": 0.5}, {"sparse_pattern": "8:16"}], ids=str)
def test_what_has_no_short_groups_is_refused(entry: dict[str, Any]) -> None:
    layer = nn.Linear(32, 4)
    model = nn.Sequential(layer)
    with pytest.raises(ConfigListError, match=r"method 'patterns' needs a sparse_pattern N:M, M <= 8, for 0"):
        LotteryJackpotPruner(model, [{"op_types": ["Linear"], **entry}], method="patterns")
    assert model[0] is layer
    assert type(layer.weight) is nn.Parameter
