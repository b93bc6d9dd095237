"""Weights that train under masks which a comparator changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_jackpot.training import Gradual, SparseTraining, Step, TrainingMethod
from nni_jackpot.training import loop as module

Update = Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Step], object]


def trained(update: Update | None, steps: int = 1) -> tuple[SparseTraining, nn.Module, torch.optim.SGD]:
    """Return a layer after steps whose gradient is 1 everywhere, under a mask that keeps two of four weights."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

    class Own(TrainingMethod):
        def update(self, *arguments: Any) -> None:
            if update is not None:
                update(*arguments)

    masks = {"0": {"weight": torch.tensor([[1.0, 1.0, 0.0, 0.0]]), "bias": None}}
    training = SparseTraining(model, optimizer, masks, Own())
    training.begin(steps)
    for _ in range(steps):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
    return training, model, optimizer


def swap(masks: dict[str, Tensor], *_: Any) -> None:
    masks["0.weight"][0, 1], masks["0.weight"][0, 2] = False, True


def test_fixed_masks_keep_pruned_weights_at_zero() -> None:
    training, model, _ = trained(None, steps=3)
    assert (model[0].weight[0, 2:] == 0).all()
    assert (model[0].weight[0, :2] != 1).all()
    assert training.finish()["0"]["weight"].tolist() == [[1, 1, 0, 0]]


def test_weights_that_enter_or_leave_have_no_momentum() -> None:
    training, model, optimizer = trained(swap)
    assert training.finish()["0"]["weight"].tolist() == [[1, 0, 1, 0]]
    (buffer,) = (state["momentum_buffer"] for state in optimizer.state.values())
    assert buffer.tolist() == [[1, 0, 0, 1]]
    assert model[0].weight[0, 1] == model[0].weight[0, 3] == 0


def test_a_comparator_sees_the_gradients_of_pruned_weights() -> None:
    seen: list[Any] = []

    def update(masks: Any, weights: Any, gradients: Any, step: Step) -> None:
        step.memory["steps"] = step.memory.get("steps", 0) + 1
        seen.append((gradients["0.weight"].tolist(), step.number, step.total, step.memory["steps"], step.lr))

    trained(update, steps=2)
    assert seen == [([[1, 1, 1, 1]], 1, 2, 1, 0.1), ([[1, 1, 1, 1]], 2, 2, 2, 0.1)]


def test_changed_masks_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.tensor([[0, 0, 1, 1]]))

    monkeypatch.setattr(module, "broadcast_tensors", broadcast)
    training, model, _ = trained(swap)
    assert training.finish()["0"]["weight"].tolist() == [[0, 0, 1, 1]]
    assert (model[0].weight[0, :2] == 0).all()


def test_a_state_is_restored() -> None:
    before, _, _ = trained(swap)
    after, model, _ = trained(None)
    after.load_state_dict(before.state_dict())
    after.begin(1)
    assert after.state_dict()["steps"] == 1
    assert torch.equal(after.finish()["0"]["weight"], before.finish()["0"]["weight"])
    assert model[0].weight[0, 1] == 0


def test_dense_masks_have_the_same_targets() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 1)})
    masks = {"a": {"weight": torch.zeros(1, 3), "bias": None}}
    training = SparseTraining(model, torch.optim.SGD(model.parameters()), masks, Gradual())
    assert training.finish()["a"].keys() == {"weight"}
    assert training.finish()["a"]["weight"].tolist() == [[1, 1, 1]]


def test_weights_that_enter_start_from_zero() -> None:
    seen: list[Any] = []
    trained(lambda masks, weights, *_: seen.append(weights["0.weight"].tolist()))
    assert seen[0][0][2:] == [0, 0]
    _, model, _ = trained(swap)
    assert model[0].weight[0, 2] == 0


def test_a_layer_without_weights_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def empty(masks: dict[str, Tensor], *_: Any) -> None:
        masks["0.weight"].fill_(False)

    trained(empty, steps=2)
    (record,) = caplog.records
    assert "keeps nothing of 0.weight: lower the sparse ratio" in record.getMessage()
