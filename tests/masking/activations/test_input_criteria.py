"""Wanda and SparseGPT as criteria, against plain derivations; the statistics that they are computed from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from nni_jackpot.errors import CalibrationError, SearchDivergedError
from nni_jackpot.masking.activations.input_statistics import CollectedInputs, InputWatcher
from nni_jackpot.masking.criteria import sparsegpt, wanda
from nni_jackpot.masking.granularity import Grains

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 7, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False), (2, 4, 5, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=(0, 1, 0), padding_mode="circular"), (2, 2, 3, 4, 5)),
    "Conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 5, 5)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "Conv3d, groups": (lambda: nn.Conv3d(4, 4, (2, 1, 2), groups=2), (2, 4, 3, 4, 5)),
    "no batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
}


def inputs_of_weight(layer: nn.Module, x: Tensor, index: int) -> Tensor:
    """Return the inputs that one weight is multiplied by: the outputs where it is 1, and all others 0."""
    alone = torch.zeros(layer.weight.numel(), dtype=x.dtype)
    alone[index] = 1
    parameters = {"weight": alone.view(layer.weight.shape)}
    if getattr(layer, "bias", None) is not None:
        parameters["bias"] = torch.zeros_like(layer.bias)
    return functional_call(layer, parameters, x)


def row_of(layer: nn.Module, index: int) -> int:
    """Return the output feature that a weight belongs to."""
    first = layer.weight[0].numel()
    return index % first if isinstance(layer, Conv1D) else index // first


def collected(layer: nn.Module, batches: list[Tensor], gram: bool) -> CollectedInputs[str]:
    def run(watcher: InputWatcher[str]) -> None:
        for x in batches:
            layer(x)

    return CollectedInputs({"w": layer.weight}, {"w": [layer]}, run, gram)


def made(kind: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make().double(), [torch.randn(shape).double() for _ in range(2)]


@pytest.mark.honours("init: wanda")
@pytest.mark.parametrize("kind", LAYERS)
def test_wanda_is_the_magnitude_times_the_norm_of_what_a_weight_is_multiplied_by(kind: str) -> None:
    layer, batches = made(kind)
    found = wanda({"w": layer.weight}, collected(layer, batches, gram=False))["w"]
    for index, weight in enumerate(layer.weight.detach().flatten()):
        norm = torch.cat([inputs_of_weight(layer, x, index).flatten() for x in batches]).norm()
        torch.testing.assert_close(found.flatten()[index], weight.abs() * norm)
    assert found.shape == layer.weight.shape


@pytest.mark.honours("init: sparsegpt")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_mask_of_sparsegpt_against_its_pseudo_code(kind: str) -> None:
    """H = X X^T + lambda I, its inverse written out, and w^2 / [H^-1]_jj for every row (Algorithm 1)."""
    layer, batches = made(kind)
    weights = layer.weight.detach().flatten()
    saliency = torch.zeros_like(weights)
    outputs = {row_of(layer, index) for index in range(len(weights))}
    for row in outputs:
        members = [index for index in range(len(weights)) if row_of(layer, index) == row]
        # A weight is multiplied by its input at the places of its own output feature alone.
        x = torch.stack(
            [torch.cat([inputs_of_weight(layer, b, index).flatten() for b in batches]) for index in members]
        )
        hessian = x @ x.T
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(members))
        inverse = torch.linalg.inv(hessian)
        for j, index in enumerate(members):
            saliency[index] = weights[index] ** 2 / inverse[j, j]
    found = sparsegpt({"w": layer.weight}, collected(layer, batches, gram=True))["w"]
    torch.testing.assert_close(found, saliency.view_as(found))
    keep = len(weights) // 3
    mask = Grains(tuple(found.shape)).select(found, keep)
    assert set(mask.flatten().nonzero().flatten().tolist()) == set(saliency.topk(keep).indices.tolist())


def test_gram_matrices_are_gathered_a_few_layers_at_a_time() -> None:
    """No run holds more numbers than all weights have, unless one layer alone does."""
    layers = {"a": nn.Linear(8, 2), "b": nn.Linear(3, 4), "c": nn.Linear(3, 4), "d": nn.Linear(20, 1)}
    weights = {name: layer.weight for name, layer in layers.items()}  # 60 numbers in all
    runs: list[list[str]] = []

    def run(watcher: InputWatcher[str]) -> None:
        runs.append(list(watcher.layers))
        for layer in layers.values():
            layer(torch.randn(5, layer.in_features))

    of_layers = {name: [layer] for name, layer in layers.items()}
    assert [key for key, _ in CollectedInputs(weights, of_layers, run, gram=True)] == list("abcd")
    assert runs == [["a"], ["b", "c"], ["d"]]
    runs.clear()
    squares = CollectedInputs(weights, of_layers, run, gram=False)
    assert all(seen.gram is None for _, seen in squares)
    assert runs == [list("abcd")]
    assert [key for key, _ in squares] == list("abcd")  # a second time
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_layers_that_share_a_weight_or_are_called_by_name() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.weight = a.weight
    x, y = torch.randn(4, 3), torch.randn(5, 3)

    def run(watcher: InputWatcher[str]) -> None:
        a(x)
        a(input=y)
        b(y)

    ((_, seen),) = CollectedInputs({"w": a.weight}, {"w": [a, b]}, run, gram=True)
    torch.testing.assert_close(seen.gram[0], x.T @ x + 2 * y.T @ y)
    torch.testing.assert_close(seen.squares[0], x.square().sum(0) + 2 * y.square().sum(0))
    assert seen.samples == 14


def test_a_large_convolution_is_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batches = made("Conv2d, groups")
    whole = dict(collected(layer, batches, gram=True))["w"]
    monkeypatch.setattr("nni_jackpot.masking.activations.layers._MOST", 1)
    parts = dict(collected(layer, batches, gram=True))["w"]
    torch.testing.assert_close(parts.gram, whole.gram)
    assert parts.samples == whole.samples


@pytest.mark.parametrize("gram", [False, True])
def test_a_layer_without_inputs_is_an_error(gram: bool) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(CalibrationError, match=r"do not reach the layer of w, .* more batches"):
        list(collected(layer, [], gram))
    with torch.no_grad(), pytest.raises(CalibrationError):  # an evaluation within the training loop
        list(collected(layer, [torch.randn(2, 3)], gram))


@pytest.mark.parametrize("criterion", [wanda, sparsegpt])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(criterion: Callable, bad: float) -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    x[1, 1] = bad
    with pytest.raises(SearchDivergedError):
        criterion({"w": layer.weight}, collected(layer, [x], gram=criterion is sparsegpt))


def test_half_precision_is_summed_in_single() -> None:
    layer = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    batches = [torch.ones(1, 2, dtype=torch.bfloat16)] * 1000
    found = wanda({"w": layer.weight}, collected(layer, batches, gram=False))["w"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, layer.weight.detach().float().abs() * 1000**0.5)
