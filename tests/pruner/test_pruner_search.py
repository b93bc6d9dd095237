from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import (
    CONFIG_LIST,
    Allocations,
    Batches,
    ConvNet,
    dense_of,
    doubles,
    expected_zeros,
    frozen,
    make_evaluator,
    same,
    search,
    training_step,
    zeros,
)
from torch import nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.search.clock import cosine

# -- through NNI's evaluator


@pytest.mark.honours("TorchEvaluator", "max_steps")
def test_evaluator_search(batches: Batches) -> None:
    pruner, start, masks, log = search(batches)
    assert len(log) == 24
    assert zeros(pruner) == expected_zeros(pruner.bound_model)
    assert not same(start, masks)
    assert pruner.evaluator.model is None
    pruner.unwrap_model()
    assert all(parameter.requires_grad for parameter in pruner.bound_model.parameters())
    assert not any(hasattr(module, "_nni_wrapper") for module in pruner.bound_model.modules())


def test_the_same_seed_gives_the_same_masks(batches: Batches) -> None:
    for init in ("magnitude", "random"):
        assert same(search(batches, seed=5, init=init)[2], search(batches, seed=5, init=init)[2])
    assert not same(search(batches, seed=5, init="random")[2], search(batches, seed=6, init="random")[2])


@pytest.mark.honours("TorchEvaluator", "max_epochs")
def test_epochs_are_the_loop_s_epochs(batches: Batches) -> None:
    pruner, _, _, log = search(batches, steps=None, epochs=3)
    assert len(log) == 3 * len(batches)
    assert pruner.learning_rate == pytest.approx(2.0 * cosine(17 / 18))  # before the last step


def test_steps_and_epochs_agree_where_the_rate_does(batches: Batches) -> None:
    constant = {"schedule": lambda progress: 1.0, "method": EdgePopup(lr=2.0, ramp_end=0.0, temperature=0.0)}
    assert same(
        search(batches, steps=12, **constant)[2], search(batches, steps=None, epochs=2, **constant)[2]
    )


def test_search_is_sgd_of_section_4_1(model: nn.Module, batches: Batches) -> None:
    """The search's own optimizer equals a plain loop with PyTorch's SGD and cosine schedule."""
    batches = doubles(batches)
    other = copy.deepcopy(model.double())
    evaluator = make_evaluator(model, batches)
    masks = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=0.5)).compress(
        24, None
    )[1]
    pruner = LotteryJackpotPruner(other, CONFIG_LIST)
    start = pruner.get_masks()
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=0.5, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 24))
    )
    other.train()
    for i in range(24):
        training_step(batches[i % len(batches)], other).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert same(masks, pruner.get_masks())
    assert not same(masks, start)


@pytest.mark.parametrize("method", [EdgePopup.paper(lr=0.5), EdgePopup(lr=0.5)], ids=["paper", "defaults"])
def test_where_weights_lie_in_memory_changes_nothing(
    model: nn.Module, batches: Batches, method: EdgePopup
) -> None:
    batches = doubles(batches)
    other = copy.deepcopy(model.double()).to(memory_format=torch.channels_last)
    assert not other.conv2.weight.is_contiguous()
    found = []
    for net in (model, other):
        pruner = LotteryJackpotPruner(net, CONFIG_LIST, make_evaluator(net, batches), method=method)
        start = pruner.get_masks()
        found.append(pruner.compress(24, None)[1])
        assert not same(start, found[-1])
    assert same(*found)


def test_another_optimizer(batches: Batches) -> None:
    made = []

    def optimizer(scores: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(scores, lr=0.01))
        return made[0]

    pruner, start, masks, _ = search(batches, optimizer=optimizer)
    assert made[0].state[pruner.score_parameters()[0]]["step"] == 24
    assert not same(start, masks)


@pytest.mark.honours("gradient accumulation")
def test_gradient_accumulation(model: nn.Module, batches: Batches) -> None:
    """Two half batches per step give the masks of the whole batches, where statistics do not mix them."""
    batches = doubles(batches)
    halves = [
        (x, y) for images, labels in batches for x, y in zip(images.chunk(2), labels.chunk(2), strict=True)
    ]
    other = copy.deepcopy(model.double())

    def half_loss(batch: Any, model: nn.Module) -> torch.Tensor:
        return training_step(batch, model) / 2

    options: dict[str, Any] = {"method": EdgePopup(lr=0.5), "norm": "freeze"}
    whole = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches), **options)
    accumulated = LotteryJackpotPruner(
        other, CONFIG_LIST, make_evaluator(other, halves, half_loss, accumulate=2), **options
    )
    start, masks = whole.get_masks(), whole.compress(12, None)[1]
    assert same(masks, accumulated.compress(12, None)[1])
    assert not same(start, masks)


def test_a_second_search_goes_on_from_the_first(batches: Batches) -> None:
    pruner, _, masks, _ = search(batches)
    assert not same(pruner.compress(6, None)[1], masks)
    assert zeros(pruner) == expected_zeros(pruner.bound_model)


@pytest.mark.parametrize("length", [(None, None), (0, None), (None, 0)])
def test_bad_lengths(model: nn.Module, batches: Batches, length: tuple) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches))
    with pytest.raises(ValueError, match=r"max_steps|compress\("):
        pruner.compress(*length)


# -- divergence


def live_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name)._nni_wrapper.weight_mask.clone() for name in ("conv1", "conv2")}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_loss_keeps_the_last_good_masks(model: nn.Module, batches: Batches, value: float) -> None:
    dense = dense_of(model)
    seen = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        loss = training_step(batch, model)
        seen.append(live_masks(model))
        return loss * value if len(seen) == 8 else loss

    evaluator = make_evaluator(model, batches, step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=5.0))
    with pytest.raises(SearchDivergedError, match="at step 8 of the search"):
        pruner.compress(24, None)
    masks = pruner.get_masks()
    assert all(torch.equal(masks[name]["weight"], mask) for name, mask in seen[6].items())
    assert any(not torch.equal(seen[6][name], mask) for name, mask in seen[7].items())
    assert frozen(model, dense)
    assert pruner.evaluator.model is None
    # and the pruner is as good as new: scores stand for those masks
    with torch.no_grad():
        model(batches[0][0])
    assert all(torch.equal(pruner.get_masks()[name]["weight"], mask) for name, mask in seen[6].items())


@pytest.mark.parametrize("steps", [24, 5])
def test_nan_gradient_keeps_the_last_good_masks(model: nn.Module, batches: Batches, steps: int) -> None:
    seen = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        loss = training_step(batch, model)
        seen.append(live_masks(model))
        if len(seen) == 5:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    evaluator = make_evaluator(model, batches, step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=5.0))
    with pytest.raises(SearchDivergedError, match="score is NaN at step 5"):
        pruner.compress(steps, None)
    assert all(torch.equal(pruner.get_masks()[name]["weight"], mask) for name, mask in seen[4].items())


# -- normalisation statistics


def test_norm_statistics_adapt_in_train_mode(batches: Batches) -> None:
    fresh = ConvNet().bn1.running_mean
    assert not torch.equal(search(batches)[0].bound_model.bn1.running_mean, fresh)
    held, start, masks, _ = search(batches, norm="freeze")
    assert torch.equal(held.bound_model.bn1.running_mean, fresh)
    assert held.bound_model.bn1.num_batches_tracked == 0
    assert not same(start, masks)


@pytest.mark.parametrize("norm", ["adapt", "freeze"])
def test_norm_statistics_are_estimated_anew(model: nn.Module, batches: Batches, norm: str) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, norm=norm)
    model.eval()
    pruner.reestimate_norm(batches)
    with torch.no_grad():
        activations = torch.cat([model.conv1(images) for images, _ in batches])
    assert torch.allclose(model.bn1.running_mean, activations.mean((0, 2, 3)), atol=1e-6)
    assert not model.training
    model.train()
    before = model.bn1.running_mean.clone()
    model(batches[0][0])
    assert torch.equal(model.bn1.running_mean, before) == (norm == "freeze")


# -- lean


class Reference:
    """Edge-popup as plainly as it can be put: a full sort of a layer's scores before every forward."""

    def __init__(self, lr: float, total: int) -> None:
        torch.manual_seed(0)
        self.net = ConvNet().requires_grad_(False)
        self.total, self.lr = total, lr
        self.layers = [self.net.conv1, self.net.conv2]
        self.weights = [layer.weight.detach().clone() for layer in self.layers]
        self.masks = [self._top(weight.abs(), torch.zeros_like(weight)) for weight in self.weights]
        self.scores = [torch.where(mask, 1.0, 0.95).requires_grad_() for mask in self.masks]
        self.optimizer = torch.optim.SGD(self.scores, lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)

    def _top(self, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        keep = scores.numel() - int(0.7 * scores.numel())
        # Stable: among equals those kept before, then the lower index.
        by_kept = kept.flatten().to(torch.int8).sort(descending=True, stable=True).indices
        order = by_kept[scores.flatten()[by_kept].sort(descending=True, stable=True).indices]
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[order[:keep]] = True
        return mask.view(scores.shape)

    def step(self, batch: Any, step: int) -> None:
        masked = []
        for i, layer in enumerate(self.layers):
            self.masks[i] = self._top(self.scores[i].detach(), self.masks[i])
            masked.append((self.weights[i] * self.masks[i]).requires_grad_())
            del layer.weight
            layer.weight = masked[i]
        self.net.train()
        training_step(batch, self.net).backward()
        for score, weight, effective in zip(self.scores, self.weights, masked, strict=True):
            score.grad = effective.grad * weight
        self.optimizer.param_groups[0]["lr"] = self.lr * cosine(step / self.total)
        self.optimizer.step()


def test_fifty_steps_are_bit_for_bit_those_of_a_plain_reference(batches: Batches) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    seen: list[list[torch.Tensor]] = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        loss = training_step(batch, model)
        seen.append([live_masks(model)[name] for name in ("conv1", "conv2")])
        return loss

    evaluator = make_evaluator(model, batches, step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=2.0))
    pruner.compress(50, None)
    reference = Reference(lr=2.0, total=50)
    for i, masks in enumerate(seen):
        reference.step(batches[i % len(batches)], i)
        assert all(torch.equal(a, b) for a, b in zip(masks, reference.masks, strict=True)), i
    assert len(seen) == 50
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))
    for group, score in zip(pruner.score_parameters(), reference.scores, strict=True):
        assert torch.equal(group, score)


def test_nothing_is_differentiated_that_no_score_needs(batches: Batches) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    flowed: list[str] = []
    for name in ("conv1", "bn1", "conv2", "bn2", "fc"):
        getattr(model, name).register_full_backward_hook(lambda *_, name=name: flowed.append(name))
    reached = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        below = torch.relu(model.bn1(model.conv1(batch[0])))
        reached.append(below.requires_grad)
        return training_step(batch, model)

    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5}]
    pruner = LotteryJackpotPruner(
        model, config, make_evaluator(model, batches, step), method=EdgePopup(lr=1.0)
    )
    pruner.compress(3, None)
    assert not any(reached)
    assert {"conv2", "bn2", "fc"} <= set(flowed)
    assert not {"conv1", "bn1"} & set(flowed)
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_is_one_graph_and_finds_the_same(batches: Batches) -> None:
    from torch._dynamo.utils import counters

    batches = doubles(batches)

    def run(compiled: bool) -> dict:
        torch.manual_seed(0)
        model = ConvNet().double()
        torch._dynamo.reset()
        counters.clear()
        function = torch.compile(model, backend="aot_eager") if compiled else model

        def step(batch: Any, model: nn.Module) -> torch.Tensor:
            return training_step(batch, function)

        evaluator = make_evaluator(model, batches, step)
        pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=2.0))
        return pruner.compress(12, None)[1]

    plain, compiled = run(False), run(True)
    assert same(plain, compiled)
    if torch.__version__ >= (2, 14):  # that of PyTorch 2.6 breaks within NNI's wrapper
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_a_loop_of_one_s_own_may_be_compiled(batches: Batches) -> None:
    def run(compiled: bool) -> dict:
        torch.manual_seed(0)
        model = ConvNet().double()
        pruner = LotteryJackpotPruner(model, CONFIG_LIST)
        torch._dynamo.reset()
        function = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(pruner.score_parameters(), lr=2.0, momentum=0.9)
        for batch in doubles(batches):
            training_step(batch, function).backward()
            optimizer.step()
            optimizer.zero_grad()
        return pruner.get_masks()

    assert same(run(False), run(True))


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_copies_neither_weights_nor_masks(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", None)  # which NNI's wrapper calls every time
    model = nn.Sequential(nn.Linear(64, 128, bias=bias), nn.ReLU(), nn.Linear(128, 8, bias=bias))
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    x = torch.randn(2, 64)
    for group in pruner._targets.groups:
        group.set_mode(is_searched=True)
    model(x)
    with Allocations() as allocations:
        loss = model(x).sum()
    assert allocations.largest <= 2 * 128 * 4
    loss.backward()
    assert all(score.grad is not None for score in pruner.score_parameters())
