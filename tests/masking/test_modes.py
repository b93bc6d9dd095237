"""Inference mode, other dtypes, several forwards before a backward, several threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner, apply_masks

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
KINDS: dict[str, dict[str, Any]] = {
    "weights": {"sparse_ratio": 0.5},
    "channels": {"sparse_ratio": 0.5, "granularity": "out_channel"},
    "pattern": {"sparse_pattern": "2:4"},
}


def net(kind: str = "weights", **options: Any) -> tuple[nn.Module, LotteryJackpotPruner]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, LotteryJackpotPruner(model, [{"op_types": ["Linear"], **KINDS[kind]}], **options)


def reference(model: nn.Module, pruner: LotteryJackpotPruner) -> nn.Module:
    """Return a plain model with the current masks."""
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(
        model[0]._nni_wrapper.weight.dtype
    )
    state = {
        n.replace("_nni_wrapper.", ""): p for n, p in model.named_parameters() if not n.endswith("_score")
    }
    plain.load_state_dict(state)
    return apply_masks(plain, pruner.get_masks())


# -- inference mode


@pytest.mark.parametrize("method", [EdgePopup(), EdgePopup.paper()], ids=["defaults", "paper"])
def test_a_forward_in_inference_mode_changes_nothing(method: EdgePopup, batches: Batches) -> None:
    found = []
    for in_inference in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        looks = []

        def step(batch: Any, model: nn.Module) -> Tensor:
            if in_inference:  # noqa: B023
                with torch.inference_mode():  # within the search, like a validation
                    looks.append(model.eval()(batch[0]))  # noqa: B023
                model.train()
            return training_step(batch, model)

        pruner = LotteryJackpotPruner(
            model, CONFIG_LIST, make_evaluator(model, batches, step=step), method=method
        )
        if in_inference:
            with torch.inference_mode():
                model.eval()(batches[0][0])
                pruner.get_masks(), model.state_dict()
        found.append(pruner.compress(12, held_out=0)[1])
        assert len(looks) == 12 * in_inference
    assert all(torch.equal(found[0][name]["weight"], found[1][name]["weight"]) for name in found[0])


def test_a_pruner_made_in_inference_mode_searches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.inference_mode():
        pruner = LotteryJackpotPruner(model, LINEAR)
        model(torch.ones(2, 8))
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=10.0)
    start = pruner.get_masks()
    for _ in range(3):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = pruner.get_masks()
    assert any(not torch.equal(masks[name]["weight"], start[name]["weight"]) for name in masks)


def test_masks_that_follow_others_follow_them_after_inference_mode() -> None:
    model, pruner = net("channels")
    with torch.inference_mode():
        model(torch.ones(2, 8))
    with torch.no_grad():
        for score in pruner.score_parameters():
            score.neg_()
    x = torch.randn(3, 8)
    assert torch.equal(model(x), reference(model, pruner)(x))


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_can_be_converted(dtype: torch.dtype, kind: str) -> None:
    model, pruner = net(kind)
    model(torch.ones(2, 8)).sum().backward()
    scores = [score.detach().clone() for score in pruner.score_parameters()]
    model.to(dtype)
    for score, before in zip(pruner.score_parameters(), scores, strict=True):
        assert score.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(score.float(), before)  # no digit is lost
        assert score.grad.dtype == score.dtype
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(model(x), reference(model, pruner)(x))
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=10.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model(x), reference(model, pruner)(x))
    model.float()
    assert all(score.dtype == torch.float32 for score in pruner.score_parameters())
    assert torch.equal(model(x.float()), reference(model, pruner)(x.float()))


def test_a_model_that_is_converted_amid_a_search_is_not_read_from_the_cache(batches: Batches) -> None:
    model = ConvNet()

    def step(batch: Any, model: nn.Module) -> Tensor:
        loss = training_step(batch, model)
        with torch.no_grad():
            assert model.double()(batch[0].double()).dtype == torch.float64
        model.float()
        return loss

    LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step=step)).compress(8, None)


def test_weights_that_are_loaded_amid_a_search_are_seen(batches: Batches) -> None:
    model = ConvNet()
    seen = []

    def step(batch: Any, model: nn.Module) -> Tensor:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            before = model.eval()(batch[0])
            twice = {n: 2 * v if n == "conv1._nni_wrapper.weight" else v for n, v in state.items()}
            model.load_state_dict(twice)
            seen.append(not torch.equal(model(batch[0]), before))
            model.load_state_dict(state)
            seen.append(torch.equal(model(batch[0]), before))
        return training_step(batch, model.train())

    evaluator = make_evaluator(model, batches, step=step)
    LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper()).compress(8, None)
    assert seen
    assert all(seen)


# -- several forwards


def between_nothing(model: nn.Module, pruner: LotteryJackpotPruner, x: Tensor) -> None:
    pass


def between_forward(model: nn.Module, pruner: LotteryJackpotPruner, x: Tensor) -> None:
    model(x)


def between_teacher(model: nn.Module, pruner: LotteryJackpotPruner, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def between_masks(model: nn.Module, pruner: LotteryJackpotPruner, x: Tensor) -> None:
    pruner.get_masks()
    model.state_dict()


def between_step(model: nn.Module, pruner: LotteryJackpotPruner, x: Tensor) -> None:
    with torch.no_grad():
        for score in pruner.score_parameters():
            score.neg_()
    model(x)


@pytest.mark.parametrize(
    "between", [between_nothing, between_forward, between_teacher, between_masks, between_step]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_between_forward_and_backward_does_not_reach_the_gradient(
    kind: str, between: Any
) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    model, pruner = net(kind)
    for _ in range(2):  # with masked weights from before, too
        plain = reference(model, pruner)
        first, second = model(x), model(2 * x)
        between(model, pruner, x)
        (expected,) = torch.autograd.grad((plain(x) * plain(2 * x)).sum(), x)
        (found,) = torch.autograd.grad((first * second).sum(), x)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_twice_is_searched_as_two_copies_would_be() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.ModuleList([layer])
    pruner = LotteryJackpotPruner(model, LINEAR)
    x = torch.randn(4, 8)
    layer(layer(x).tanh()).square().sum().backward()
    (score,) = pruner.score_parameters()
    weight = layer._nni_wrapper.weight
    free = layer.weight.detach().requires_grad_()
    bias = layer.bias
    once = nn.functional.linear(x, free, bias).tanh()
    nn.functional.linear(once, free, bias).square().sum().backward()
    assert torch.allclose(score.grad, free.grad * weight, rtol=1e-5, atol=1e-6)


def test_graphs_that_are_dropped_do_not_keep_masked_weights() -> None:
    model, pruner = net()
    relaxed = model[0]._nni_wrapper.weight_masked
    optimizer = torch.optim.SGD(pruner.score_parameters(), lr=0.0)
    places = set()
    for _ in range(4):
        model(torch.randn(2, 8))  # a graph without a backward pass
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
        places.add(relaxed.cache.values.data_ptr())
    assert len(places) == 1


# -- threads


def test_forwards_of_several_threads_compute_the_same() -> None:
    model, pruner = net()
    model.eval()
    inputs = [torch.randn(3, 8) for _ in range(50)]
    expected = [reference(model, pruner)(x) for x in inputs]
    with torch.no_grad():
        for score in pruner.score_parameters():  # the first forward finds the masks out of date
            score.add_(torch.zeros_like(score))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model, inputs * 8))
    assert all(torch.equal(y, expected[i % 50]) for i, y in enumerate(found))


def test_copies_of_a_wrapped_model_are_searched_apart() -> None:
    model, _ = net()
    twin = copy.deepcopy(model)
    before = model(torch.ones(1, 8))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("_score"):
                parameter.neg_()
    assert not torch.equal(twin(torch.ones(1, 8)), before)
    assert torch.equal(model(torch.ones(1, 8)), before)
