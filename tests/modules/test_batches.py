"""Batches are passed as the model's forward requires, and statistics are re-estimated completely or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, ConvNet
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import CalibrationError
from nni_jackpot.modules.batches import inputs_of


class OneInput(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class TwoInputs(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        return x, y


class Optional(nn.Module):
    def forward(self, x: Any, mask: Any = None) -> Any:
        return x, mask


class ByName(nn.Module):
    def forward(self, input_ids: Any = None, *, labels: Any = None) -> Any:
        return input_ids, labels


class Anything(nn.Module):
    def forward(self, input_ids: Any, **rest: Any) -> Any:
        return input_ids, rest


class Shell(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (OneInput(), 1, (1,), {}),
        (OneInput(), (1, 2), (1,), {}),
        (OneInput(), [1, 2, 3], (1,), {}),
        (OneInput(), {"image": 1}, ({"image": 1},), {}),
        (OneInput(), ([1, 2], 3), ([1, 2],), {}),
        (TwoInputs(), (1, 2, 3), (1, 2), {}),
        (TwoInputs(), ((1, 2), 3), (1, 2), {}),
        (TwoInputs(), {"x": 1, "y": 2, "label": 3}, (), {"x": 1, "y": 2}),
        (Optional(), (1, 2), (1,), {}),
        (ByName(), {"input_ids": 1, "labels": 2, "index": 3}, (), {"input_ids": 1, "labels": 2}),
        (ByName(), ({"input_ids": 1}, 2), (), {"input_ids": 1}),
        (Anything(), {"input_ids": 1, "other": 2}, (), {"input_ids": 1, "other": 2}),
        (Shell(TwoInputs()), (1, 2, 3), (1, 2), {}),
        (Shell(Shell(ByName())), {"input_ids": 1, "index": 3}, (), {"input_ids": 1}),
        (nn.DataParallel(TwoInputs()), (1, 2, 3), (1, 2), {}),
    ],
)
def test_a_model_gets_what_it_takes(model: nn.Module, batch: Any, args: Any, kwargs: Any) -> None:
    assert inputs_of(model, batch) == (args, kwargs)


# -- norm statistics


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".bn" in f".{name}"}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


IMAGES = torch.randn(4, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(ConvNet):
    def forward(self, image: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return super().forward(image * scale)


class Scaled(ConvNet):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return super().forward(image * scale)


@pytest.mark.parametrize(
    ("network", "batches"),
    [
        (Network, [{"image": x, "label": 0} for x in IMAGES]),
        (Network, [({"image": x}, 0) for x in IMAGES]),
        (Scaled, [(x, torch.tensor(1.0), 0) for x in IMAGES]),
        (Scaled, [((x, torch.tensor(1.0)), 0) for x in IMAGES]),
        (Network, (x for x in IMAGES)),
    ],
    ids=["dicts", "dicts and labels", "two inputs and labels", "pairs and labels", "an iterator"],
)
def test_statistics_are_the_same_whatever_form_batches_have(
    network: Callable[[], nn.Module], batches: Iterable[Any]
) -> None:
    torch.manual_seed(0)
    plain = Network()
    other = network()
    other.load_state_dict(plain.state_dict())
    found = []
    for model, loader in ((plain, [(x, 0) for x in IMAGES]), (other, batches)):
        LotteryJackpotPruner(model, CONFIG_LIST).reestimate_norm(loader)
        found.append(statistics(model))
    assert same(*found)


def test_statistics_are_the_mean_of_all_batches() -> None:
    torch.manual_seed(0)
    model = Network()
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    pruner.reestimate_norm(list(IMAGES))
    first = torch.stack([model.conv1(x).mean((0, 2, 3)) for x in IMAGES]).mean(0)
    assert torch.allclose(model.bn1.running_mean, first, atol=1e-6)
    assert model.bn1.momentum == 0.1


def fails_after(batches: Iterable[Any], error: Exception) -> Iterable[Any]:
    yield from batches
    raise error


used_up = iter([IMAGES[0]])
next(used_up)
PIXEL = torch.randn(1, 1, 1, 1)


@pytest.mark.parametrize("norm", ["adapt", "freeze"])
@pytest.mark.parametrize(
    ("make_batches", "error", "words"),
    [
        (lambda: [], CalibrationError, "need a batch"),
        (lambda: used_up, CalibrationError, "need a batch"),
        (lambda: [IMAGES[0], {"picture": IMAGES[1]}], CalibrationError, "fails on batch 2"),
        (
            lambda: [IMAGES[0], IMAGES[1, :, :, :, :2].repeat(1, 2, 1, 1)],
            CalibrationError,
            "fails on batch 2",
        ),
        (lambda: fails_after([IMAGES[0]], OSError("the disk")), OSError, "the disk"),
        (lambda: fails_after([IMAGES[0]], KeyboardInterrupt()), KeyboardInterrupt, ""),
    ],
    ids=["none", "used up", "a dict of other names", "another shape", "the loader", "interrupted"],
)
def test_whatever_fails_leaves_statistics_and_settings(
    make_batches: Any, error: type, words: str, norm: str
) -> None:
    model = Network()
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, norm=norm)
    with torch.no_grad():
        model.bn1.running_mean.fill_(3.0)
    model.train()
    model.bn2.eval()
    before, modes = statistics(model), [module.training for module in model.modules()]
    with pytest.raises(error, match=words):
        pruner.reestimate_norm(make_batches())
    assert same(statistics(model), before)
    assert [module.training for module in model.modules()] == modes
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.1)
    held = copy.deepcopy(before)
    model.train()(IMAGES[0])
    assert same(statistics(model), held) is (norm == "freeze")


def test_a_last_batch_of_one_that_cannot_be_normalised_leaves_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    with pytest.raises(CalibrationError, match=r"fails on batch 2.*more than 1 value"):
        pruner.reestimate_norm([IMAGES[0], IMAGES[1][:1]])
    assert torch.equal(model[2].running_mean, torch.zeros(8))
    assert model[2].momentum == 0.1
