"""The kernels of a GPU, run by Triton's interpreter where there is none."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step, zeros
from resumption import check_resumed
from test_topk import coin, every_kind, long, reference
from torch import Generator, Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Method, Supermask
from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking import refresh
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.soft_mask import soft_mask

pytest.importorskip("triton")
gpu: Any = importlib.import_module("nni_jackpot.masking.triton_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "is_accelerator", lambda device: True)
    monkeypatch.setattr(refresh, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def layer(score: Tensor, keep: int, mask: Tensor) -> Any:
    weight = torch.randn(len(score))
    tensors = (tensor.to(DEVICE) for tensor in (score, mask, weight, weight * mask))
    score, mask, weight, values = tensors
    return gpu.Layer(score, keep, mask, weight, values)


def layers_of(make: Any) -> list[Any]:
    """Layers of all sizes, among them some with more than one program looks at, and masks before."""
    generator = Generator().manual_seed(0)
    sizes = ((39, 0), (39, 39), (500, 50), (500, 251), (1000, 999), (20_000, 2000), (16_384, 1))
    return [layer(long(make, generator, n), keep, coin(generator, n)) for n, keep in sizes]


@every_kind
def test_masks_are_the_largest_scores(make: Any) -> None:
    layers = layers_of(make)
    if layers[0].score.dtype != torch.float32:
        pytest.skip("scores are float32 there")
    before = [each.mask.clone() for each in layers]
    changes = [torch.empty_like(mask) for mask in before]
    done = gpu.update_masks(layers, changes)
    for each, was, changed, is_done in zip(layers, before, changes, done, strict=True):
        wanted = reference(each.score, each.keep, was.cpu()).to(DEVICE)
        equals = int((each.score >= each.score[wanted].min()).sum()) if each.keep else 0
        assert is_done == (equals == each.keep)
        assert torch.equal(each.mask, wanted if is_done else was)
        if is_done:
            assert torch.equal(changed, was != wanted)
            assert torch.equal(each.values, each.weight * wanted)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_leaves_all_masks_alone(sign: float) -> None:
    layers = [layer(torch.rand(500), keep, coin(Generator().manual_seed(0), 500)) for keep in (5, 490, 0)]
    before = [each.mask.clone() for each in layers]
    layers[1].score[7] = sign * torch.nan
    with pytest.raises(SearchDivergedError, match="NaN"):
        gpu.update_masks(layers, [torch.empty_like(mask) for mask in before])
    assert all(torch.equal(each.mask, was) for each, was in zip(layers, before, strict=True))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_soft_masks_are_those_of_the_formula(temperature: float) -> None:
    generator = Generator().manual_seed(0)
    sizes = ((100, 7), (500, 500), (16_384, 1600), (15_000, 14_000))  # so that the sample is all there is
    layers = [layer(torch.randn(n, generator=generator), keep, coin(generator, n)) for n, keep in sizes]
    gpu.weigh(layers, temperature)
    for each in layers:
        grains = Grains((len(each.score),))
        soft = soft_mask(each.score, each.mask, each.keep, grains, temperature)
        torch.testing.assert_close(each.values, each.weight * soft)


def test_many_scores_are_judged_by_a_sample() -> None:
    each = layer(torch.randn(100_000, generator=Generator().manual_seed(0)), 10_000, torch.ones(100_000))
    gpu.weigh([each], 0.5)
    threshold = each.score.sort().values[90_000]
    exact = each.weight * torch.sigmoid((each.score - threshold) / (0.5 * each.score.std()))
    # The deviation of 16384 scores is known to 0.55%: within five times that it moves no sigmoid(x) by more
    # than 2.8% of x * sigmoid'(x), which is 0.224 at most.
    assert ((each.values - exact).abs() <= 0.0063 * each.weight.abs() + 1e-6).all()


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 6, 1, 1), (3, 2, 2, 3, 2)])
def test_channels_may_come_last(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    score, mask = torch.randn(shape, device=DEVICE), torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    weight = torch.randn(shape, device=DEVICE).to(memory_format=layout)
    each = gpu.Layer(score, score.numel() // 3, mask, weight, torch.zeros_like(weight))
    gpu.update_masks([each], [torch.empty_like(mask)])
    assert torch.equal(each.values, weight * mask)
    gpu.weigh([each], 0.5)
    soft = soft_mask(score, mask, each.keep, Grains(shape), 0.5)
    torch.testing.assert_close(each.values, weight * soft)
    assert gpu.layout_of(torch.randn(4, 6).t()) is None


def searched(batches: Batches, method: Method) -> tuple[LotteryJackpotPruner, list[Tensor]]:
    """Search, and return the pruner and its scores; the masks are looked at in between."""
    torch.manual_seed(0)
    model = ConvNet().to(DEVICE)
    batches = [(images.to(DEVICE), labels.to(DEVICE)) for images, labels in batches]
    seen: list[int] = []

    def step(batch: Any, model: nn.Module) -> Tensor:
        loss = training_step(batch, model)
        if len(seen) % 5 == 4:
            pruner.get_masks()
            with torch.no_grad():
                model(batch[0])
        seen.append(1)
        return loss

    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step), method=method)
    pruner.compress(18, None)
    return pruner, [score.detach().clone() for score in pruner.score_parameters()]


@pytest.mark.parametrize(
    "method",
    [
        EdgePopup.paper(lr=2.0),
        EdgePopup(temperature=0.0, lr=0.1),
        Supermask(),
        EdgePopup.paper(lr=2.0, swap_limit=0.05),
    ],
    ids=["paper", "without soft masks", "supermask", "limited swaps"],
)
def test_a_search_is_the_same_bit_for_bit(
    batches: Batches, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, scores = searched(batches, method)
    monkeypatch.setattr(refresh, "has_kernels", lambda device: False)
    expected, expected_scores = searched(batches, method)
    assert all(torch.equal(a, b) for a, b in zip(scores, expected_scores, strict=True))
    masks, expected_masks = pruner.get_masks(), expected.get_masks()
    assert all(torch.equal(masks[name]["weight"], expected_masks[name]["weight"]) for name in masks)
    assert pruner.flips == expected.flips


def test_soft_masks_lead_to_the_same(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner, scores = searched(batches, EdgePopup(lr=0.03))
    monkeypatch.setattr(refresh, "has_kernels", lambda device: False)
    expected, expected_scores = searched(batches, EdgePopup(lr=0.03))
    for score, other in zip(scores, expected_scores, strict=True):
        torch.testing.assert_close(score, other, rtol=0, atol=1e-3)  # thresholds are rounded elsewhere
    assert zeros(pruner) == zeros(expected)


def test_a_loop_of_one_s_own(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks() -> Any:
        torch.manual_seed(0)
        model = ConvNet().to(DEVICE)
        pruner = LotteryJackpotPruner(model, CONFIG_LIST)
        optimizer = torch.optim.SGD(pruner.score_parameters(), lr=2.0, momentum=0.9)
        for images, labels in batches:
            training_step((images.to(DEVICE), labels.to(DEVICE)), model).backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(pruner.get_masks())

    found = masks()
    monkeypatch.setattr(refresh, "has_kernels", lambda device: False)
    assert all(torch.equal(mask["weight"], found[name]["weight"]) for name, mask in masks().items())


@pytest.mark.parametrize("method", [EdgePopup.paper(lr=5.0), EdgePopup(lr=5.0)], ids=["paper", "defaults"])
def test_a_resumed_search_goes_on_with_kernels(batches: Batches, tmp_path: Path, method: Method) -> None:
    check_resumed(batches, tmp_path / "checkpoint.pth", 4, device=DEVICE, length=(7, None), method=method)


def test_without_a_compiler_there_is_another_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    refresh.has_kernels.cache_clear()

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    try:
        assert not refresh.has_kernels(torch.device("cpu"))
        monkeypatch.setattr(gpu, "try_out", fail)
        for _ in range(2):
            assert not refresh.has_kernels(torch.device("cuda"))
        assert caplog.text.count("Failed to find C compiler") == 1
    finally:
        refresh.has_kernels.cache_clear()
    monkeypatch.undo()
    gpu.try_out(torch.device(DEVICE))
