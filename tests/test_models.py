from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.experiment.config import ModelConfig
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.models.resnet import ResNet, pad_shortcut


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", [8, 9, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_output_shape(size: int, in_channels: int) -> None:
    model = ResNet(8, 4, num_classes=7, in_channels=in_channels)
    assert model(torch.randn(2, in_channels, size, size)).shape == (2, 7)


def test_stages_halve_the_image_and_double_the_channels() -> None:
    model = ResNet(8, 4, 10, 1)
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: shapes.__setitem__(name, output.shape[1:])

    for name, module in model.named_children():
        module.register_forward_hook(note(name))
    model(torch.randn(2, 1, 28, 28))
    assert [tuple(shapes[stage]) for stage in ("conv1", "stage1", "stage2", "stage3")] == [
        (4, 28, 28),
        (4, 28, 28),
        (8, 14, 14),
        (16, 7, 7),
    ]


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (14, 14), (20, 20), (32, 32)])
def test_depth_counts_the_layers_with_weights(depth: int, layers: int) -> None:
    model = ResNet(depth, 2, 10, 1)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == layers


@pytest.mark.parametrize("depth", [2, 7, 9, 18])
def test_depth_that_is_not_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 \(8, 14, 20, \.\.\.\), got {depth}"):
        ResNet(depth, 4, 10, 1)


def test_parameters_of_resnet20_are_those_of_the_paper() -> None:
    # He et al. 2016, Table 6: 0.27 M.
    assert parameters(ResNet(20, 16, 10, 3)) == 269_722


def test_shortcut_has_every_second_pixel_and_zeros() -> None:
    x = torch.randn(2, 3, 7, 8)
    y = pad_shortcut(x, 4)
    assert y.shape == (2, 7, 4, 4)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = ResNet(14, 4, 10, 1)
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_initial_weights_are_kaimings() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 32, 10, 1)
    weight = model.get_parameter("stage3.0.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not model.fc.bias.any()


def test_activations_neither_vanish_nor_explode() -> None:
    torch.manual_seed(0)
    logits = ResNet(32, 8, 10, 1)(torch.randn(64, 1, 8, 8))
    assert 0.1 < logits.std().item() < 30


def test_traces_symbolically() -> None:
    model = ResNet(14, 4, 10, 1).eval()
    x = torch.randn(3, 1, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    modules = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert len(modules) == len(set(modules))


def test_build_model() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelConfig(name="resnet", depth=14, width=4), num_classes=5, in_channels=2)

    model = build()
    assert isinstance(model, ResNet)
    x: Tensor = torch.randn(2, 2, 8, 8)
    assert model(x).shape == (2, 5)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 13
    again = build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in build().state_dict().items())
