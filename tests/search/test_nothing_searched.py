"""A search in which scores have no gradient, or no step is taken, says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import nni
import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import NothingSearchedError

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


class Body(nn.Module):
    """A body that some way of calling it keeps gradients from, and a head."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.body, x))


def without_gradients(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


def reentrant(body: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(body, x, use_reentrant=True)


def detached(body: nn.Module, x: Tensor) -> Tensor:
    return body(x).detach()


def in_vain(body: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(1)[:, :16] + 0 * len(body(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("call", [without_gradients, reentrant, detached, in_vain])
def test_a_weight_that_the_loss_does_not_depend_on_is_named(call: Any, batches: Batches) -> None:
    model = Body(call)
    pruner = LotteryJackpotPruner(model, LINEAR, make_evaluator(model, batches))
    with pytest.raises(NothingSearchedError, match=r"^body\.1\.weight had no gradient in the first step"):
        pruner.compress(4, None)


@pytest.mark.parametrize("method", ["edge_popup", "supermask"])
def test_checkpoints_that_are_not_reentrant_are_searched(method: str, batches: Batches) -> None:
    masks = []
    for call in (lambda body, x: checkpoint(body, x, use_reentrant=False), lambda body, x: body(x)):
        torch.manual_seed(0)
        model = Body(call)
        pruner = LotteryJackpotPruner(model, LINEAR, make_evaluator(model, batches), init="random")
        masks.append(pruner.compress(12, None)[1])
    assert torch.equal(masks[0]["body.1"]["weight"], masks[1]["body.1"]["weight"])


class Experts(nn.Module):
    """Layers of which a forward uses one: the first until `used` says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(3))
        self.used = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.used](x)


def test_an_expert_that_no_forward_has_used_yet_is_warned_of(
    batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    model = Experts()
    forwards = iter(range(100))

    def step(batch: Any, model: Any) -> Tensor:
        model.used = min(next(forwards), 1)
        return training_step(batch, model)

    pruner = LotteryJackpotPruner(model, LINEAR, make_evaluator(model, batches, step=step))
    with caplog.at_level(logging.WARNING, "nni_jackpot"):
        pruner.compress(6, None)
    first, last = (record.getMessage() for record in caplog.records if record.name.startswith("nni_jackpot"))
    assert "experts.1.1.weight, experts.2.1.weight had no gradient in the first step" in first
    assert last.startswith("experts.2.1.weight had no gradient in the whole search")


def test_a_search_that_nothing_trains_is_an_error(batches: Batches) -> None:
    def steps_nothing(model: Any, optimizer: Any, step: Any, scheduler: Any, *length: Any) -> None:
        step(batches[0], model).backward()

    model = ConvNet()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, TorchEvaluator(steps_nothing, optimizer, training_step))
    with pytest.raises(NothingSearchedError, match="took no step"):
        pruner.compress(4, None)


def test_a_loop_that_steps_the_second_optimizer_only_is_an_error(batches: Batches) -> None:
    def steps_second(model: Any, optimizers: Any, step: Any, scheduler: Any, *length: Any) -> None:
        step(batches[0], model).backward()
        optimizers[1].step()

    model = ConvNet()
    sgd = nni.trace(torch.optim.SGD)
    optimizers = [sgd(model.conv1.parameters(), lr=0.1), sgd(model.fc.parameters(), lr=0.1)]
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, TorchEvaluator(steps_second, optimizers, training_step))
    with pytest.raises(NothingSearchedError, match="first optimizer"):
        pruner.compress(4, None)


def test_a_loop_without_backward_is_an_error(batches: Batches) -> None:
    def forwards_only(model: Any, optimizer: Any, step: Any, scheduler: Any, *length: Any) -> None:
        step(batches[0], model)
        optimizer.step()

    model = ConvNet()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, TorchEvaluator(forwards_only, optimizer, training_step))
    with pytest.raises(NothingSearchedError, match="no gradient in the first step"):
        pruner.compress(4, None)
