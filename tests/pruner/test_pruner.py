from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    CONFIG_LIST,
    Batches,
    ConvNet,
    dense_of,
    expected_zeros,
    frozen,
    make_evaluator,
    same,
    search,
    training_step,
    zeros,
)
from torch import nn
from torch.nn import functional as F

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import MaskError, NothingKeptError

# -- initial masks


@pytest.mark.honours("init: magnitude")
def test_initial_masks_are_the_largest_weights(model: nn.Module) -> None:
    dense = dense_of(model)
    masks = LotteryJackpotPruner(model, CONFIG_LIST).get_masks()
    for name in ("conv1", "conv2"):
        weight, mask = dense[f"{name}.weight"].abs(), masks[name]["weight"]
        assert weight[mask == 1].min() >= weight[mask == 0].max()
    assert list(masks) == ["conv1", "conv2"]
    assert type(masks) is dict
    assert masks["conv1"]["bias"] is None


@pytest.mark.honours("init: random")
def test_random_masks_follow_the_seed() -> None:
    def masks(seed: int) -> dict:
        torch.manual_seed(0)
        model = ConvNet()
        torch.manual_seed(seed)
        return LotteryJackpotPruner(model, CONFIG_LIST, init="random").get_masks()

    assert same(masks(1), masks(1))
    assert not same(masks(1), masks(2))


def test_random_masks_are_the_same_in_every_process() -> None:
    # NNI selects modules through a set of strings, whose order hashes decide.
    code = (
        "import torch; from torch import nn; from nni_jackpot import LotteryJackpotPruner; torch.manual_seed(0);"
        "model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(6)]);"
        "config = [{'op_types': ['Linear'], 'sparse_ratio': 0.5}];"
        "masks = LotteryJackpotPruner(model, config, init='random').get_masks();"
        "print([(n, m['weight'].flatten().tolist()) for n, m in masks.items()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_initial_scores_are_settable(model: nn.Module) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, method=EdgePopup(kept_score=0.6, pruned_score=0.5))
    for score, masks in zip(pruner.score_parameters(), pruner.get_masks().values(), strict=True):
        assert torch.equal(score, torch.where(masks["weight"] == 1, 0.6, 0.5))


@pytest.mark.parametrize("kept", [0.5, float("inf")])
def test_bad_initial_scores(kept: float) -> None:
    with pytest.raises(ValueError, match=r"score: found .* allowed: a number"):
        EdgePopup(kept_score=kept)


def test_a_bad_criterion(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="init must be one of"):
        LotteryJackpotPruner(model, CONFIG_LIST, init="oracle")
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- every kind of layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (partial(nn.Conv1d, 4, 6, 3), (2, 4, 9)),
        (partial(nn.Conv2d, 4, 6, 3), (2, 4, 9, 9)),
        (partial(nn.Conv3d, 4, 6, 3), (2, 4, 5, 5, 5)),
        (partial(nn.Conv2d, 4, 6, 3, groups=2), (2, 4, 9, 9)),
        (partial(nn.Linear, 4, 6), (2, 4)),
        (partial(nn.ConvTranspose1d, 4, 6, 3), (2, 4, 9)),
        (partial(nn.ConvTranspose2d, 4, 6, 3), (2, 4, 9, 9)),
        (partial(nn.ConvTranspose3d, 4, 6, 3), (2, 4, 5, 5, 5)),
        (partial(nn.ConvTranspose2d, 4, 6, 3, groups=2), (2, 4, 9, 9)),
    ],
    ids=lambda value: value.func.__name__ if isinstance(value, partial) else "",
)
def test_layers(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    dense = dense_of(model)
    x = torch.randn(shape)
    kind = type(model[0]).__name__
    pruner = LotteryJackpotPruner(model, [{"op_types": [kind], "sparse_ratio": 0.6}])
    before = pruner.get_masks()
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=50.0)
    for _ in range(3):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = pruner.get_masks()["0"]["weight"]
    assert int((mask == 0).sum()) == int(0.6 * mask.numel())
    assert not same(before, pruner.get_masks())
    reference = copy.deepcopy(layer())
    reference.load_state_dict({"weight": dense["0.weight"] * mask, "bias": dense["0.bias"]})
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
    pruner.unwrap_model()
    assert frozen(model, dense)


# -- your own loop


@pytest.mark.honours("a loop of your own")
def test_own_loop_searches_and_freezes(model: nn.Module, batches: Batches) -> None:
    dense = dense_of(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    start = pruner.get_masks()
    optimizer = torch.optim.Adam(pruner.score_parameters(), lr=0.01)
    for _ in range(10):
        for batch in batches:
            training_step(batch, model).backward()
            optimizer.step()
            optimizer.zero_grad()
            # exact at every moment, whatever moved the scores
            assert zeros(pruner) == expected_zeros(model)
            assert frozen(model, dense)
    wrapped, masks = pruner.compress()
    assert wrapped is model
    assert same(masks, pruner.get_masks())
    assert not same(masks, start)


def test_frozen_means_every_parameter(model: nn.Module, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    training_step(batches[0], model).backward()
    scores = {id(score) for score in pruner.score_parameters()}
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in scores)
        assert (parameter.grad is not None) == (id(parameter) in scores)


def test_a_search_without_an_evaluator_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="needs an evaluator"):
        LotteryJackpotPruner(model, CONFIG_LIST).compress(max_steps=None, max_epochs=1)


# -- wrapping, copying, saving


def test_wrap_and_unwrap(model: nn.Module, batches: Batches) -> None:
    dense, x = dense_of(model), batches[0][0]
    model.fc.bias.requires_grad_(False)
    model.eval()
    dense_output = model(x)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    masks, sparse_output = pruner.get_masks(), model(x)
    assert not torch.equal(sparse_output, dense_output)
    for _ in range(2):
        pruner.unwrap_model()
        assert frozen(model, dense)
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"fc.bias"}
        assert list(model.state_dict()) == list(ConvNet().state_dict())
        assert torch.equal(model(x), dense_output)
        pruner.wrap_model()
        assert frozen(model, dense)
        assert torch.equal(model(x), sparse_output)
        assert same(pruner.get_masks(), masks)
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith("_score"))
    # the scores are still those that the masks follow
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=2.0)
    training_step(batches[0], model).backward()
    for score in pruner.score_parameters():
        assert score.grad is not None
        score.grad.copy_(score.detach())
    optimizer.step()  # all change their signs, so that those kept are the least
    assert not same(pruner.get_masks(), masks)


def test_wrapping_twice_is_harmless(model: nn.Module) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    pruner.wrap_model()
    pruner.unwrap_model()
    pruner.unwrap_model()
    assert all(parameter.requires_grad for parameter in model.parameters())


def copies() -> Iterator[Any]:
    yield pytest.param(copy.deepcopy, id="deepcopy")
    yield pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle")

    def save_and_load(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    yield pytest.param(save_and_load, id="torch.save")


@pytest.mark.parametrize("duplicate", list(copies()))
def test_copies_of_the_wrapped_model(model: nn.Module, batches: Batches, duplicate: Callable) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    training_step(batches[0], model).backward()  # leaves a graph behind
    with torch.no_grad():
        for score in pruner.score_parameters():
            score.mul_(-1)  # masks that are out of date
    twin = duplicate(model)
    model.eval()
    twin.eval()
    x = batches[1][0]
    assert torch.equal(twin(x), model(x))
    # and the copy is independent
    before = model(x)
    scores = [p for n, p in twin.named_parameters() if n.endswith("_score")]
    with torch.no_grad():
        for score in scores:
            score.mul_(-1)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)
    twin.train()
    training_step(batches[0], twin).backward()
    assert all(score.grad is not None for score in scores)


def test_state_dict_round_trip(batches: Batches) -> None:
    pruner, _, masks, _ = search(batches)
    with torch.no_grad():
        pruner.score_parameters()[0].mul_(-1)  # a mask that is out of date
    state = copy.deepcopy(pruner.bound_model.state_dict())
    assert torch.equal(state["conv1._nni_wrapper.weight_mask"], pruner.get_masks()["conv1"]["weight"])
    torch.manual_seed(9)
    other = ConvNet()
    other_pruner = LotteryJackpotPruner(other, CONFIG_LIST, init="random")
    other.load_state_dict(state)
    other.eval(), pruner.bound_model.eval()
    assert torch.equal(other(batches[0][0]), pruner.bound_model(batches[0][0]))
    assert same(other_pruner.get_masks(), pruner.get_masks())
    assert not same(masks, pruner.get_masks())
    other_pruner.unwrap_model()
    pruner.unwrap_model()
    for name, value in other.state_dict().items():
        assert torch.equal(value, pruner.bound_model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    dense = dense_of(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    F.cross_entropy(model(x).float(), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(pruner.score_parameters(), lr=0.1).step()
    assert all(score.dtype != torch.bfloat16 for score in pruner.score_parameters())
    assert model(x).dtype == dtype
    assert zeros(pruner) == expected_zeros(model)
    pruner.unwrap_model()
    assert frozen(model, dense)


@pytest.mark.honours("mixed precision")
def test_autocast(model: nn.Module, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_step(batches[0], model)
    loss.backward()
    assert all(score.grad.dtype == torch.float32 for score in pruner.score_parameters())
    assert all(score.grad.abs().sum() > 0 for score in pruner.score_parameters())


def test_follows_the_model_to_another_device(model: nn.Module) -> None:
    # The meta device stands in for an accelerator: everything the forward needs must have moved.
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    model(torch.randn(2, 1, 8, 8))
    model.to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {score.device.type for score in pruner.score_parameters()} == {"meta"}


# -- masks from elsewhere


def test_update_masks_starts_the_search_from_them(model: nn.Module, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(
        model, CONFIG_LIST, make_evaluator(model, batches), method=EdgePopup(lr=2.0)
    )
    mask = torch.zeros_like(model.conv1.weight)
    mask.view(-1)[::4] = 1
    bias = torch.ones(12)
    bias[0] = 0
    pruner.update_masks({"conv1": {"weight": mask}, "conv2": {"bias": bias}})
    assert torch.equal(pruner.get_masks()["conv1"]["weight"], mask)
    assert torch.equal(pruner.get_masks()["conv2"]["bias"], bias)
    masks = pruner.compress(12, None)[1]
    assert masks["conv1"]["weight"].sum() == mask.sum()
    assert not torch.equal(masks["conv1"]["weight"], mask)


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        ({"fc": {"weight": torch.ones(3, 12)}}, MaskError, r"fc\.weight is not a target"),
        ({"conv1": {"weight": torch.ones(3)}}, MaskError, r"conv1\.weight has shape \(3,\)"),
        ({"conv1": {"weight": torch.zeros(8, 1, 3, 3)}}, NothingKeptError, "keeps nothing"),
    ],
)
def test_update_masks_refuses_what_does_not_fit(
    model: nn.Module, masks: dict, error: type, words: str
) -> None:
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    before = pruner.get_masks()
    with pytest.raises(error, match=words):
        pruner.update_masks({"conv2": {"weight": 1 - before["conv2"]["weight"]}, **masks})
    assert same(pruner.get_masks(), before)


def test_ddp_is_told_not_to_send_masks_and_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored == {f"{i}._nni_wrapper.weight_mask" for i in (0, 2)}
    assert ignored < {name for name, _ in model.named_buffers()}
    pruner.unwrap_model()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    model._ddp_params_and_buffers_to_ignore = ["1.running_mean"]
    pruner.wrap_model()
    assert model._ddp_params_and_buffers_to_ignore == {*ignored, "1.running_mean"}
    pruner.unwrap_model()
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_mean"]


def test_weights_are_there_once(model: nn.Module) -> None:
    weight = model.conv1.weight
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    assert model.conv1._nni_wrapper.weight is weight
    assert [name for name in model.state_dict() if "conv1" in name] == [
        f"conv1._nni_wrapper.{name}" for name in ("weight", "weight_score", "weight_mask")
    ]
    before = weight.detach().clone()
    pruner.unwrap_model()
    assert model.conv1.weight is weight
    assert torch.equal(weight, before)
