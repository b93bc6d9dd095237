from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step
from plain_space import masked_parameter
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.masking import refresh
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.soft_mask import mask_softly, soft_mask
from nni_jackpot.masking.topk import keep_top


def soft(score: Tensor, keep: int, grains: Grains, temperature: float, **options: Any) -> Tensor:
    return soft_mask(score, grains.select(score, keep), keep, grains, temperature, **options)


# -- the numbers


@pytest.mark.parametrize("keep", [1, 7, 39])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0])
def test_the_formula(keep: int, temperature: float) -> None:
    score = torch.randn(5, 8)
    threshold = score.flatten().sort(descending=True).values[keep - 1]
    expected = torch.sigmoid((score - threshold) / (temperature * score.std()))
    out = torch.empty(5, 8)
    found = soft(score, keep, Grains((5, 8)), temperature, out=out)
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(found, soft(score, keep, Grains((5, 8)), temperature))
    assert torch.equal(found >= 0.5, keep_top(score, keep))


@pytest.mark.parametrize("row_dim", [None, 0])
def test_every_row_has_a_threshold_of_its_own(row_dim: int | None) -> None:
    rows, along = (6, 0) if row_dim == 0 else (4, 1)
    offset = 10.0 * torch.arange(rows)
    score = torch.randn(4, 6) + (offset if row_dim == 0 else offset[:, None])
    found = soft(score, 2 * rows, Grains((4, 6), rows=rows, row_dim=row_dim), 0.1)
    assert torch.equal((found >= 0.5).sum(along), torch.full((rows,), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 8), (300, 1001)])
def test_weights_under_the_soft_mask(shape: tuple[int, int], dtype: torch.dtype) -> None:
    score, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    keep, grains, out = score.numel() // 10, Grains(shape), torch.empty(shape, dtype=dtype)
    mask = grains.select(score, keep)
    mask_softly(weight, score, mask, keep, grains, 0.5, out)
    # Nearly equal: the last numbers of a block may take another path through the sigmoid.
    torch.testing.assert_close(out, weight * soft_mask(score, mask, keep, grains, 0.5))
    sample = score.flatten().sort().values
    if score.numel() <= 1 << 14:
        threshold = sample[score.numel() - keep]
        slope = 1 / (0.5 * sample.std())
        torch.testing.assert_close(out, weight * torch.sigmoid((score - threshold) * slope))


def test_many_scores_are_judged_by_a_sample() -> None:
    n, sample, share = 300_000, 1 << 14, 0.1
    score = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    score[0, :2] = torch.tensor([3.0, -3.0])
    found = soft(score, int(share * n), Grains((300, 1000)), 2.0)
    # Five standard errors of a sample's share and of its standard deviation.
    error = 5 * (share * (1 - share) / sample) ** 0.5
    assert abs(int((found >= 0.5).sum()) - share * n) < error * n
    ahead = (score[0, 0] - score[0, 1]) / (2.0 * score.std())
    between = found[0, 0].logit() - found[0, 1].logit()
    assert between.item() == pytest.approx(ahead.item(), rel=5 / (2 * sample) ** 0.5)


def test_nothing_to_decide() -> None:
    score, grains = torch.randn(3, 4), Grains((3, 4))
    assert torch.equal(soft(score, 12, grains, 0.5), torch.ones(3, 4))
    assert torch.equal(soft(score, 12, grains, 0.5, out=torch.empty(3, 4)), torch.ones(3, 4))


def test_equal_scores_are_half_kept() -> None:
    assert torch.equal(soft(torch.full((3, 4), 5.0), 6, Grains((3, 4)), 0.5), torch.full((3, 4), 0.5))


# -- in a forward


@pytest.fixture
def hardening() -> MaskedParameter:
    """A masked parameter that keeps 6 of 20 weights."""
    weight = nn.Parameter(torch.randn(4, 5), requires_grad=False)
    score = nn.Parameter(torch.randn(4, 5))
    return masked_parameter(weight, score, Grains((4, 5)).select(score.detach(), 6))


def test_training_sees_soft_masks_and_all_else_the_mask(hardening: MaskedParameter) -> None:
    weight, score, mask = hardening.weight, hardening.score, hardening.mask
    hardening.temperature = 0.5
    for _ in range(2):  # alternately: neither may use the other's cached result
        expected = weight * soft(score.detach(), 6, hardening.grains, 0.5)
        seen = hardening.masked(weight)
        torch.testing.assert_close(seen.detach(), expected)
        with torch.no_grad():
            assert torch.equal(hardening.masked(weight), weight * mask)
    hardening.temperature = 0.0
    assert torch.equal(hardening.masked(weight).detach(), weight * mask)


def test_the_gradient_is_straight_through(hardening: MaskedParameter) -> None:
    weight, score = hardening.weight, hardening.score
    hardening.temperature = 0.5
    direction = torch.randn(4, 5)
    hardening.masked(weight).backward(direction)
    assert torch.equal(score.grad, direction * weight)


def test_soft_masks_follow_scores(hardening: MaskedParameter) -> None:
    weight, score = hardening.weight, hardening.score
    hardening.temperature = 0.5
    hardening.masked(weight)
    with torch.no_grad():
        score += torch.linspace(0, 0.01, 20).view(4, 5)  # no score crosses the threshold
    expected = weight * soft(score.detach(), 6, hardening.grains, 0.5)
    torch.testing.assert_close(hardening.masked(weight).detach(), expected)


def test_a_weight_that_trains_gets_the_gradient_of_the_soft_mask(hardening: MaskedParameter) -> None:
    frozen, score = hardening.weight, hardening.score
    hardening.temperature = 0.5
    weight = frozen.detach().clone().requires_grad_() * 1.0  # like a quantizer's output
    (gradient,) = torch.autograd.grad(hardening.masked(weight).sum(), weight)
    torch.testing.assert_close(gradient, soft(score.detach(), 6, hardening.grains, 0.5))


# -- in a search


@pytest.mark.parametrize(
    "entry",
    [
        {"sparse_ratio": 0.8},
        {"sparse_ratio": 0.5, "granularity": "out_channel"},
        {"sparse_ratio": 0.5, "granularity": [1, 1], "internal_metric_block": 2},
    ],
)
def test_masks_harden_in_the_course_of_a_search(
    entry: dict[str, Any], model: ConvNet, batches: Batches
) -> None:
    dense = model.conv2.weight.detach().clone()
    trained_on: list[int] = []  # number of weights neither kept nor pruned, per step
    looked_at: list[int] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        kept = module.weight.detach() / dense
        undecided = int(((kept > 1e-3) & (kept < 1 - 1e-3)).sum())
        (trained_on if torch.is_grad_enabled() else looked_at).append(undecided)

    def step(batch: Any, model: nn.Module) -> Tensor:
        loss = training_step(batch, model)
        with torch.no_grad():
            model(batch[0])
        return loss

    model.conv2.register_forward_hook(look)
    config_list = [{"op_names": ["conv2"], **entry}]
    pruner = LotteryJackpotPruner(model, config_list, make_evaluator(model, batches, step))
    _, masks = pruner.compress(max_steps=20, held_out=0)
    assert max(trained_on[:10]) > 0
    assert not any(trained_on[19:])
    assert looked_at == [0] * 20
    mask = masks["conv2"]["weight"]
    assert mask is not None
    assert int((mask == 0).sum()) == int(entry["sparse_ratio"] * mask.numel())


def test_masks_wait_until_somebody_asks(
    model: ConvNet, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed: list[int] = []
    update_top = refresh.update_top
    monkeypatch.setattr(refresh, "update_top", lambda *a, **k: refreshed.append(1) or update_top(*a, **k))
    calls: list[int] = []

    def step(batch: Any, model: nn.Module) -> Tensor:
        calls.append(len(refreshed))
        if len(calls) == 6:
            masks = pruner.get_masks()
            for score, name in zip(pruner.score_parameters(), ("conv1", "conv2"), strict=True):
                kept = masks[name]["weight"] == 1
                assert score[kept].min() >= score[~kept].max()
        return training_step(batch, model)

    evaluator = make_evaluator(model, batches, step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup(lr=0.1, anneal_end=0.8))
    pruner.compress(max_steps=20, held_out=0)
    waits = [after - before for before, after in itertools.pairwise(calls)]
    assert waits[1:5] == [0] * 4
    assert waits[5] == 2  # by get_masks
    assert waits[6:15] == [0] * 9
    assert waits[17:] == [2] * 2  # hard masks at the end


def test_without_softness(model: ConvNet, batches: Batches) -> None:
    with pytest.raises(ValueError, match=r"temperature: found -1.0 .float., allowed: null or a number >= 0"):
        LotteryJackpotPruner(model, CONFIG_LIST, method=EdgePopup(temperature=-1.0))
    with pytest.raises(ValueError, match=r"temperature: found 0.5, allowed with anneal_end > 0"):
        LotteryJackpotPruner(model, CONFIG_LIST, method=EdgePopup(anneal_end=0.0))
    with pytest.raises(ValueError, match=r"temperature: found 0.5, allowed with anneal_end > 0"):
        EdgePopup.paper(temperature=0.5)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, method=EdgePopup.paper())
    assert pruner.method.schedule.temperature == 0
