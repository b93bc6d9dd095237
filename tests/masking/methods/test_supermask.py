"""The supermask: what training sees is drawn, and what is found has exactly the budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, dense_of, doubles, frozen, make_evaluator, same, search
from nni.compression.pruning import AGPPruner
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Supermask
from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.methods import MaskSchedule
from nni_jackpot.masking.methods.supermask import SampledMask

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.8}]
GRANULARITIES: list[dict[str, Any]] = [
    {"granularity": "default"},
    {"granularity": "out_channel"},
    {"granularity": [4, 5]},
    {"granularity": "out_channel", "internal_metric_block": 3},
    {"sparse_ratio": None, "sparse_pattern": "2:4"},
]


def linear(**config: Any) -> tuple[nn.Linear, MaskedParameter]:
    """Return a wrapped layer of 20 inputs and 24 outputs, and its target."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 24, bias=False, dtype=torch.float64)
    entry = {key: value for key, value in {**LINEAR[0], **config}.items() if value is not None}
    pruner = LotteryJackpotPruner(nn.Sequential(layer), [entry], method="supermask")
    return layer, pruner._targets.parameters[0]


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weights that a forward has, which is given all unit vectors."""
    return layer(torch.eye(20, dtype=torch.float64)).T


def probabilities(target: MaskedParameter) -> Tensor:
    """Return sigmoid(score + shift) with a shift, one a row of grains, found by bisection."""
    grains = target.grains
    dim = -1 if grains.row_dim is None else grains.row_dim
    across = target.score.detach().movedim(dim, -1)
    rows = across.reshape(grains.rows, -1)
    low, high = torch.full((grains.rows, 1), -50.0).double(), torch.full((grains.rows, 1), 50.0).double()
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.sigmoid(rows + middle).sum(1, keepdim=True) > target.keep / grains.rows
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.sigmoid(rows + low).view(across.shape).movedim(-1, dim)


def spread_scores(target: MaskedParameter) -> None:
    with torch.no_grad():
        target.score.copy_(4 * torch.randn(target.score.shape, dtype=torch.float64))


@pytest.mark.parametrize("config", GRANULARITIES, ids=str)
def test_samples_have_the_probabilities_of_the_scores(config: dict[str, Any]) -> None:
    layer, target = linear(**config)
    spread_scores(target)
    for _ in range(20):  # until the shift has followed
        weight_of(layer)
    n = 1000
    drawn = [(weight_of(layer) != 0).detach() for _ in range(n)]
    for sample in drawn[:9]:
        assert torch.equal(target.grains.expand(target.grains.of_mask(sample)).expand(24, 20), sample)
    grains = torch.stack([target.grains.of_mask(sample) for sample in drawn]).double()
    expected = probabilities(target)
    assert expected.sum() == pytest.approx(target.keep)
    variance = expected * (1 - expected)
    assert ((grains.mean(0) - expected).abs() < 5 * (variance / n).sqrt() + 2 / n).all()
    # One sample says nothing of the next, where it could.
    kept = (grains - expected)[:, variance > 0.05]
    together = (kept[1:] * kept[:-1]).mean(0) / variance[variance > 0.05]
    assert len(together) > 3
    assert together.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9, 0.99])
def test_the_density_is_the_budget_s_from_the_start_and_stays_so(ratio: float) -> None:
    layer, target = linear(sparse_ratio=ratio)
    keep, generator = 480 - int(ratio * 480), torch.Generator().manual_seed(1)
    sizes = []
    for step in range(400):
        sizes.append((weight_of(layer) != 0).sum().item())
        if step >= 100:  # all scores drift, and spread
            with torch.no_grad():
                noise = torch.randn(target.score.shape, dtype=torch.float64, generator=generator)
                target.score.add_(0.1 + 0.05 * noise)
    for part in (sizes[:100], sizes[100:]):
        deviation = (480 * ratio * (1 - ratio) / len(part)) ** 0.5
        assert sum(part) / len(part) == pytest.approx(keep, abs=5 * deviation + 0.02 * keep)
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("config", GRANULARITIES, ids=str)
@pytest.mark.parametrize("without", ["training", "gradients"])
def test_outside_training_the_mask_is_the_largest_scores(config: dict[str, Any], without: str) -> None:
    layer, target = linear(**config)
    spread_scores(target)
    layer.train(without != "training")
    with torch.set_grad_enabled(without != "gradients"):
        seen = weight_of(layer) != 0
    wanted = target.grains.expand(target.grains.select(target.score.detach(), target.keep))
    assert torch.equal(seen, wanted.expand(24, 20))
    assert int(seen.sum()) == target.keep * target.grains.size
    assert torch.equal(target.mask, seen)


@pytest.mark.parametrize("config", GRANULARITIES, ids=str)
@pytest.mark.parametrize("may_write", [False, True])
def test_the_gradient_passes_through_the_draw(config: dict[str, Any], may_write: bool) -> None:
    _, target = linear(**config)
    spread_scores(target)
    weight, x = target.weight, torch.randn(7, 20, dtype=torch.float64)
    assert isinstance(target, SampledMask)
    for _ in range(20):
        target.sample(weight)
    effective = target.sample(weight, may_write)
    F.linear(x, effective).pow(2).sum().backward()

    free = (weight * (effective != 0)).detach().requires_grad_()
    F.linear(x, free).pow(2).sum().backward()
    assert free.grad is not None
    probability = probabilities(target)
    slope = probability * (1 - probability)
    expected = target.grains.reduce(free.grad * weight.detach(), lambda weights: weights.sum(-1)) * slope
    torch.testing.assert_close(target.score.grad, expected)


def test_rows_of_a_convolution_keep_their_number_on_average(model: nn.Module) -> None:
    config = [{"op_names": ["conv2"], "sparse_pattern": "2:4"}]
    (target,) = LotteryJackpotPruner(model.double(), config, method="supermask")._targets.parameters
    spread_scores(target)
    for _ in range(20):
        effective = target.sample(target.weight)
    effective.sum().backward()
    probability = probabilities(target)
    torch.testing.assert_close(target.score.grad, target.weight * probability * (1 - probability))


def test_scores_may_have_moved_unseen_after_a_sample() -> None:
    layer, target = linear()
    weight_of(layer).sum().backward()
    target.score.data.neg_()  # as a fused optimizer does, without a new version
    seen = weight_of(layer.eval()) != 0
    assert (target.score[seen] > 0).all()
    assert int(seen.sum()) == target.keep


def test_a_gradient_reaches_what_lies_behind_the_weight() -> None:
    _, target = linear()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    effective = target.sample(target.weight * scale)
    effective.sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, effective.detach().sum() / 2)


def test_every_forward_has_a_sample_and_the_seed_decides_which() -> None:
    layer = nn.Linear(20, 24, bias=False, dtype=torch.float64)

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        pruner = LotteryJackpotPruner(nn.Sequential(layer), LINEAR, method="supermask")
        state = torch.get_rng_state()
        samples = [weight_of(layer).detach() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        pruner.unwrap_model()
        return samples

    for one, again, other in zip(drawn(1), drawn(1), drawn(2), strict=True):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    first, second, _ = drawn(1)
    assert not torch.equal(first, second)


def test_what_shares_scores_shares_samples() -> None:
    layers = [nn.Linear(20, 24, bias=False, dtype=torch.float64) for _ in range(3)]
    entry = {**LINEAR[0], "granularity": "out_channel"}
    config = [{**entry, "op_names": ["0", "1"], "dependency_group_id": 0}, {**entry, "op_names": ["2"]}]
    LotteryJackpotPruner(nn.Sequential(*layers), config, method="supermask")
    for _ in range(3):
        first, second, other = ((weight_of(layer) != 0).any(1).tolist() for layer in layers)
        assert first == second
        assert first != other


def test_what_keeps_everything_is_whole_in_training() -> None:
    layer, target = linear(sparse_ratio=0.0)
    weight = weight_of(layer)
    assert torch.equal(weight, target.weight)


# -- searches


def found(batches: Batches, seed: int = 0, **options: Any) -> tuple[dict, dict]:
    _, start, masks, _ = search(batches, seed, **{"method": Supermask(lr=0.2), **options})
    return start, masks


def test_same_seed_same_masks(batches: Batches) -> None:
    start, masks = found(batches)
    for name, zeros in (("conv1", 50), ("conv2", 604)):
        assert (masks[name]["weight"] == 0).sum() == zeros == (start[name]["weight"] == 0).sum()
    assert not same(start, masks)
    assert same(masks, found(batches)[1])
    assert not same(masks, found(batches, seed=1)[1])
    assert not same(masks, found(batches, method=EdgePopup(lr=0.2))[1])


def test_the_method_leaves_the_random_numbers_of_others_alone(model: nn.Module) -> None:
    def start(method: str) -> tuple[dict, Tensor]:
        torch.manual_seed(3)
        pruner = LotteryJackpotPruner(copy.deepcopy(model), CONFIG_LIST, init="random", method=method)
        return pruner.get_masks(), torch.rand(1)

    (masks, number), (others, other) = start("supermask"), start("edge_popup")
    assert same(masks, others)
    assert number == other


def test_rates_are_of_its_own() -> None:
    assert LotteryJackpotPruner(ConvNet(), CONFIG_LIST, method="supermask").method == Supermask()
    for own, others in (
        (Supermask(), EdgePopup().suited_to(has_batch_norm=True)),
        (Supermask.paper(), EdgePopup.paper()),
    ):
        assert own.lr > others.lr
        assert (own.weight_decay, own.schedule) == (0.0, MaskSchedule())
        assert own.normalize == others.normalize


def test_a_sample_a_forward_where_gradients_are_accumulated(model: nn.Module, batches: Batches) -> None:
    evaluator = make_evaluator(model, batches, accumulate=3)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method="supermask")
    pruner.compress(4, None)
    assert {target.state_dict()["samples"] for target in pruner._targets.parameters} == {12}


def test_the_budget_of_a_schedule_is_followed(model: nn.Module, batches: Batches) -> None:
    dense = dense_of(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches), method="supermask")
    AGPPruner(pruner, interval_steps=3, total_times=4).compress(20, None)
    assert [int((m["weight"] == 0).sum()) for m in pruner.get_masks().values()] == [50, 604]
    assert frozen(model, dense)


def test_a_search_that_diverges_goes_on_with_samples(model: nn.Module, batches: Batches) -> None:
    steps = 0

    def step(batch: Any, model: nn.Module) -> Tensor:
        nonlocal steps
        steps += 1
        return F.cross_entropy(model(batch[0]), batch[1]) * (float("nan") if steps == 5 else 1)

    pruner = LotteryJackpotPruner(
        model, CONFIG_LIST, make_evaluator(model, batches, step), method="supermask"
    )
    with pytest.raises(SearchDivergedError):
        pruner.compress(20, None)
    masks = pruner.get_masks()
    assert [int((m["weight"] == 0).sum()) for m in masks.values()] == [50, 604]
    assert not same(masks, pruner.compress(20, None)[1])
    assert {target.state_dict()["samples"] for target in pruner._targets.parameters} == {20}


def test_a_loop_of_one_s_own_may_be_compiled(batches: Batches) -> None:
    def run(compiled: bool) -> dict:
        torch.manual_seed(0)
        model = ConvNet().double()
        pruner = LotteryJackpotPruner(model, CONFIG_LIST, method="supermask")
        optimizer = torch.optim.SGD(pruner.score_parameters(), lr=100.0)
        function = torch.compile(model, backend="aot_eager") if compiled else model
        for images, labels in doubles(batches):
            F.cross_entropy(function(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return pruner.get_masks()

    assert same(run(False), run(True))


def test_a_copy_draws_the_same(model: nn.Module) -> None:
    LotteryJackpotPruner(model, CONFIG_LIST, method="supermask")
    x = torch.randn(2, 1, 8, 8)
    model(x)
    other = copy.deepcopy(model)
    assert torch.equal(model(x), other(x))


# -- what is refused


def test_there_is_no_such_method(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match="method must be one of edge_popup, patterns, supermask, got 'lottery'"
    ):
        LotteryJackpotPruner(model, CONFIG_LIST, method="lottery")
    assert all(parameter.requires_grad for parameter in model.parameters())
