"""Recipes of a search: the paper's, ours, and what can be set in their place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator
from nni.compression.pruning import AGPPruner
from torch import nn

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.methods import EdgePopup
from nni_jackpot.search.optimizers.normalized_sgd import NormalizedSGD, optimizer_of

CONFIG_LIST = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]


def zeros_of(model: nn.Module) -> list[int]:
    """Zeros in the masks as they are, with no refresh."""
    return [int((b == 0).sum()) for name, b in model.named_buffers() if name.endswith("weight_mask")]


def watched(
    model: nn.Module, batches: Batches, config: list[dict[str, Any]] = CONFIG_LIST, **options: Any
) -> tuple[LotteryJackpotPruner, list[list[int]]]:
    """Return a pruner, and the list that gets the zeros of all masks at every forward of its search."""
    seen: list[list[int]] = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if pruner.method.schedule.temperature:  # no forward reads the masks themselves
            pruner.get_masks()
        seen.append(zeros_of(model))
        return loss

    pruner = LotteryJackpotPruner(model, config, make_evaluator(model, batches, step), **options)
    return pruner, seen


def test_gradients_are_scaled_to_rms_one_per_tensor() -> None:
    scores = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2))]
    gradients = [torch.randn(3, 5) * 1e-6, torch.randn(7) * 1e4, torch.zeros(2)]
    optimizer = NormalizedSGD([[score] for score in scores], lr=0.5, momentum=0.9)
    for step in (1.0, 1.9):  # momentum
        before = [score.detach().clone() for score in scores]
        for score, gradient in zip(scores, gradients, strict=True):
            score.grad = gradient.clone()
        optimizer.step()
        for score, gradient, old in zip(scores[:2], gradients, before, strict=False):
            expected = -0.5 * step * gradient / gradient.pow(2).mean().sqrt()
            torch.testing.assert_close(score.detach() - old, expected)
        assert not scores[2].any()


def test_gradients_of_a_group_are_scaled_as_one() -> None:
    scores = [nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    scores[0].grad, scores[1].grad = torch.full((6,), 4.0), torch.full((2,), 4.0)
    NormalizedSGD([scores[:3]], lr=1.0).step()
    moved = torch.cat([score.detach() for score in scores])
    torch.testing.assert_close(moved, torch.tensor([-1.0] * 8 + [0.0]))


def test_the_search_does_not_depend_on_the_scale_of_the_loss(batches: Batches) -> None:
    def masks(scale: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = ConvNet()

        def step(batch: Any, model: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1]) * scale

        pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step))
        start = pruner.get_masks()
        found = pruner.compress(24, None)[1]
        assert not torch.equal(found["conv2"]["weight"], start["conv2"]["weight"])
        return found

    one, other = masks(1.0), masks(2.0**-20)  # a power of two changes no digit
    assert all(torch.equal(one[name]["weight"], other[name]["weight"]) for name in one)


def test_no_gradient_anywhere_moves_nothing() -> None:
    score = nn.Parameter(torch.ones(1000))
    optimizer = optimizer_of(EdgePopup(lr=0.003, weight_decay=0.0), [[score]])
    score.grad = torch.zeros(1000)
    optimizer.step()
    assert torch.equal(score.detach(), torch.ones(1000))


def test_zeros_grow_from_none_to_the_budget(model: nn.Module, batches: Batches) -> None:
    pruner, seen = watched(model, batches, method=EdgePopup(ramp_end=0.5))
    budget = zeros_of(model)
    assert budget == [57, 691]
    pruner.compress(20, held_out=0)
    assert seen[0] == seen[1] == [0, 0]  # the step before the second forward was taken at progress 0
    for before, after in itertools.pairwise(seen):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert seen[6][1] == 864 - (173 + -(-691 * (1 - 5 / 20 / 0.5) ** 3 // 1))  # the cubic law, rounded up
    assert seen[10] != budget
    assert seen[11:] == [budget] * 9
    assert zeros_of(model) == budget


def test_the_paper_has_all_zeros_at_every_step(model: nn.Module, batches: Batches) -> None:
    pruner, seen = watched(model, batches, method=EdgePopup.paper())
    pruner.compress(12, held_out=0)
    assert seen == [[57, 691]] * 12


def test_rows_grow_alike(model: nn.Module, batches: Batches) -> None:
    pruner, seen = watched(model, batches, [{"op_names": ["fc"], "sparse_pattern": "2:4"}])
    masks = pruner.compress(12, None)[1]["fc"]["weight"]
    size = masks.numel()
    assert {zeros[0] for zeros in seen} == {0, size // 4, size // 2}
    assert (masks.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("ramp_end", [0.0, 0.8])
def test_targets_of_a_global_group_trade_weights(model: nn.Module, batches: Batches, ramp_end: float) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.8, "global_group_id": 0}]
    pruner, seen = watched(model, batches, config, method=EdgePopup(ramp_end=ramp_end, lr=0.1))
    start = zeros_of(model)
    pruner.compress(40, None)
    total = int(0.8 * (72 + 864 + 36))
    assert sum(start) == sum(zeros_of(model)) == total
    if ramp_end:
        assert [sum(zeros) for zeros in seen] == sorted(sum(zeros) for zeros in seen)
    else:
        assert {sum(zeros) for zeros in seen} == {total}


class Rivals(nn.Module):
    """Two layers of 10 outputs and 20 inputs that begin alike: two outputs of each have the larger weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rising, self.falling = nn.Linear(20, 10, bias=False), nn.Linear(20, 10, bias=False)
        for layer in (self.rising, self.falling):
            layer.weight.data = torch.ones(10, 20)
            layer.weight.data[:2] = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.falling(x).sum() - self.rising(x).sum()


@pytest.mark.parametrize("ramp_end", [0.0, 0.8])
@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        # Of 400 weights 80 are kept, at a density of 0.2: a tenth of that is 0.02 of 200, and a channel of 10.
        ({}, [124, 196]),
        ({"granularity": "out_channel"}, [140, 180]),
        ({"max_sparse_ratio": 0.99}, [124, 196]),
        ({"max_sparse_ratio": 0.9}, [140, 180]),
        ({"min_sparse_ratio": 0.7}, [140, 180]),
        # 20 rows of ten weights keep as many each, and so one at least.
        ({"internal_metric_block": 20}, [140, 180]),
    ],
    ids=str,
)
def test_a_target_keeps_a_tenth_of_its_group_s_density(
    options: dict[str, Any], zeros: list[int], ramp_end: float
) -> None:
    """The gradient of a score is its weight, or minus its weight, at every step: one layer is to lose all."""

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        return model(batch[0])

    model = Rivals()
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.8, "global_group_id": 0, **options}]
    evaluator = make_evaluator(model, [(torch.ones(1, 20), torch.empty(0))], step)
    pruner = LotteryJackpotPruner(model, config, evaluator, method=EdgePopup(ramp_end=ramp_end, lr=0.1))
    assert zeros_of(model) == [160, 160]
    pruner.compress(20, None)
    rising, falling = pruner.score_parameters()
    assert rising.min() > falling.max()
    assert zeros_of(model) == zeros


def test_bounds_of_a_target_hold_where_weights_are_traded(model: nn.Module, batches: Batches) -> None:
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.8, "global_group_id": 0, "max_sparse_ratio": 0.5},
        {"op_names": ["conv2"], "sparse_ratio": 0.8, "global_group_id": 0},
    ]
    pruner, seen = watched(model, batches, config, method=EdgePopup(lr=0.1))
    pruner.compress(40, None)
    assert max(zeros[0] for zeros in seen) <= 36
    assert sum(zeros_of(model)) == int(0.8 * 936)


def test_the_paper_s_budgets_stay(model: nn.Module, batches: Batches) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.8, "global_group_id": 0}]
    pruner, seen = watched(model, batches, config, method=EdgePopup.paper(lr=20.0))
    start = zeros_of(model)
    pruner.compress(24, held_out=0)
    assert seen == [start] * 24


@pytest.mark.parametrize("pool", [{}, {"global_group_id": 0}], ids=["alone", "traded"])
def test_a_search_cut_short_ends_with_the_budget(
    model: nn.Module, batches: Batches, pool: dict[str, int]
) -> None:
    pruner, seen = watched(model, batches, [{**entry, **pool} for entry in CONFIG_LIST])
    budget = zeros_of(model)

    def stop(*_: Any) -> None:
        if len(seen) == 5:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pruner.compress(24, None)
    handle.remove()
    assert sum(seen[-1]) < sum(budget)
    assert sum(zeros_of(model)) == sum(budget)
    assert pool or zeros_of(model) == budget


def test_a_search_that_diverges_ends_with_the_budget(model: nn.Module, batches: Batches) -> None:
    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * (float("nan") if steps == 5 else 1)

    steps = 0
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step))
    with pytest.raises(SearchDivergedError):
        pruner.compress(24, None)
    assert zeros_of(model) == [57, 691]


def test_nni_schedules_sparsity_itself(model: nn.Module, batches: Batches) -> None:
    pruner, seen = watched(model, batches)
    AGPPruner(pruner, interval_steps=3, total_times=4).compress(20, None)
    assert 0 < seen[5][1] < seen[10][1] < seen[-1][1] == 691


def test_what_is_given_takes_the_place_of_the_recipe() -> None:
    assert EdgePopup.paper(lr=0.7, ramp_end=0.25) == EdgePopup(
        lr=0.7,
        momentum=0.9,
        weight_decay=5e-4,
        normalize=False,
        ramp_end=0.25,
        temperature=0.0,
        anneal_end=0.0,
        reallocate=False,
    )
    assert LotteryJackpotPruner(ConvNet(), CONFIG_LIST).method == EdgePopup().suited_to(has_batch_norm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp_end": 1.5}, "ramp_end: found 1.5 .float., allowed: null or a number >= 0 and <= 1"),
        ({"ramp_end": -0.1}, "ramp_end: found -0.1 .float., allowed: null or a number >= 0 and <= 1"),
        ({"anneal_end": 1.5}, "anneal_end: found 1.5 .float., allowed: a number >= 0 and <= 1"),
        ({"swap_limit": 0.1}, "swap_limit: found 0.1, allowed with ramp_end 0, .* recipe paper"),
        (
            {"swap_limit": 0.1, "ramp_end": 0.0, "reallocate": False, "temperature": 0.5, "anneal_end": 0.5},
            "swap_limit: found 0.1, allowed with ramp_end 0, .* recipe paper",
        ),
    ],
)
def test_what_does_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgePopup(**options)
