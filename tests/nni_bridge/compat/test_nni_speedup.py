"""NNI's pruners and speedup on torchvision's models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from nni.compression.pruning import FPGMPruner, L2NormPruner, LevelPruner
from nni_pruning import CONVOLUTIONS, speedup
from torch import nn
from torchvision import models

import nni_jackpot  # noqa: F401


def small_vgg() -> nn.Module:
    model = models.vgg11_bn()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, 10)
    return model


def small_vit() -> nn.Module:
    model = models.VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    nn.init.normal_(model.heads.head.weight)  # Initially all 0, which blocks gradients.
    return model


@pytest.mark.parametrize(
    ("make", "size", "config_list"),
    [
        pytest.param(models.resnet18, 32, CONVOLUTIONS, id="resnet18"),
        pytest.param(models.mobilenet_v2, 32, CONVOLUTIONS, id="mobilenet_v2"),
        pytest.param(models.mobilenet_v3_small, 32, CONVOLUTIONS, id="mobilenet_v3_small"),
        pytest.param(small_vgg, 32, CONVOLUTIONS, id="vgg11_bn"),
        pytest.param(models.densenet121, 32, CONVOLUTIONS, id="densenet121"),
        pytest.param(
            lambda: models.squeezenet1_0(dropout=0.0),
            48,
            [{**CONVOLUTIONS[0], "exclude_op_names": ["classifier.1"]}],
            id="squeezenet1_0",
        ),
        pytest.param(models.efficientnet_b0, 32, CONVOLUTIONS, id="efficientnet_b0"),
        pytest.param(models.mnasnet0_5, 32, CONVOLUTIONS, id="mnasnet0_5"),
        pytest.param(models.regnet_x_400mf, 32, CONVOLUTIONS, id="regnet_x_400mf"),
        pytest.param(
            lambda: models.googlenet(aux_logits=False, init_weights=False), 32, CONVOLUTIONS, id="googlenet"
        ),
        pytest.param(
            lambda: models.inception_v3(aux_logits=False, init_weights=False),
            96,
            CONVOLUTIONS,
            id="inception_v3",
        ),
        pytest.param(
            small_vit, 32, [{"op_names_re": [r".*mlp\.0"], "sparse_ratio": 0.5}], id="vision_transformer"
        ),
    ],
)
def test_torchvision_models_shrink_and_compute_the_same(
    make: Callable[[], nn.Module], size: int, config_list: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)  # mobilenet_v3_small differs for some random weights, 1 of 12 tried
    left, masked, after = speedup(make(), size, config_list)
    assert left < 0.92
    assert after.isfinite().all()
    assert masked.abs().max() > 0
    torch.testing.assert_close(after, masked, rtol=1e-3, atol=1e-4 * masked.abs().max().item())


@pytest.mark.parametrize("pruner_class", [LevelPruner, L2NormPruner, FPGMPruner])
def test_other_pruners_work(pruner_class: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    left, masked, after = speedup(model, 8, [{"op_names": ["0"], "sparse_ratio": 0.5}], pruner_class)
    if pruner_class is LevelPruner:  # Masks of single weights remove no channel, and are dropped.
        assert left == 1.0
    else:
        assert left < 0.6
        torch.testing.assert_close(after, masked, rtol=1e-3, atol=1e-4)


def test_a_traced_model_computes_the_same() -> None:
    model = models.resnet18().eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(concrete_trace(model, (x,))(x), model(x))
