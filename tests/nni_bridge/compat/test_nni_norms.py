"""Norm layers in all of PyTorch's settings, after convolutions that lose channels."""

from __future__ import annotations

import itertools

import pytest
import torch
from nni_pruning import same, shrink
from torch import Tensor, nn

import nni_jackpot  # noqa: F401

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SETTINGS = [
    {"affine": affine, "track_running_stats": tracks}
    for affine, tracks in itertools.product((True, False), (True, False))
]
KEPT = [1, 3, 5, 7]


class Last(nn.Sequential):
    """Channels in the last dimension, as in transformers."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, last = self
        return last(norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def masks_of(model: nn.Sequential) -> dict[str, dict[str, Tensor]]:
    weight = torch.zeros_like(model[0].weight)
    weight[KEPT] = 1
    return {"0": {"weight": weight, "bias": weight.flatten(1)[:, 0].clone()}}


def with_values(norm: nn.Module) -> nn.Module:
    """Give a norm layer random weights and statistics that map a channel of zeros to zeros."""
    for name, tensor in norm.state_dict().items():
        if name in ("weight", "running_var"):
            tensor.uniform_(0.5, 1.5)
    return norm


def between(dims: int, norm: nn.Module) -> nn.Sequential:
    convolution = CONVOLUTION[dims]
    return nn.Sequential(convolution(3, 8, 3), with_values(norm), nn.ReLU(), convolution(8, 4, 1)).eval()


def image(dims: int) -> Tensor:
    return torch.randn(4, 3, *[9] * dims)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("norms", [BATCH, INSTANCE], ids=["batch", "instance"])
def test_a_norm_layer_keeps_what_belongs_to_the_channels_left(
    norms: dict[int, type[nn.Module]], dims: int, settings: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    norm = norms[dims](8, **settings)
    model = between(dims, norm)
    _, masked, after = shrink(model, image(dims), masks_of(model))
    assert model[0].out_channels == model[1].num_features == 4
    for name, tensor in model[1].state_dict().items():
        before = norm.state_dict()[name]
        torch.testing.assert_close(tensor, before[KEPT] if before.dim() else before)
    same(after, masked)


def test_statistics_that_were_taken_away_are_missed_by_no_one() -> None:
    norm = nn.BatchNorm2d(8)
    model = between(2, norm)
    norm.running_mean = norm.running_var = None
    _, masked, after = shrink(model, image(2), masks_of(model))
    same(after, masked)


def test_a_linear_layer_may_come_before_a_batch_norm_without_statistics() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)
    ).eval()
    _, masked, after = shrink(model, torch.randn(16, 3), masks_of(model))
    assert model[1].num_features == 4
    same(after, masked)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_synchronised_batch_norm_loses_channels_as_any_other(settings: dict[str, bool]) -> None:
    model = between(2, nn.SyncBatchNorm(8, **settings))
    _, masked, after = shrink(model, image(2), masks_of(model))
    assert isinstance(model[1], nn.SyncBatchNorm)
    same(after, masked)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("norms", [BATCH, INSTANCE], ids=["batch", "instance"])
def test_three_dimensions_stay_as_they_are_since_nni_shrinks_no_conv3d(
    norms: dict[int, type[nn.Module]], settings: dict[str, bool]
) -> None:
    model = between(3, norms[3](8, **settings))
    x = image(3)
    dense = model(x).detach()
    left, _, after = shrink(model, x, masks_of(model))
    assert left == 1
    torch.testing.assert_close(after, dense)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        nn.RMSNorm(8, elementwise_affine=False),
    ],
    ids=repr,
)
def test_a_norm_over_channels_keeps_the_weights_of_those_left(norm: nn.Module) -> None:
    model = Last(nn.Conv2d(3, 8, 3), with_values(norm), nn.Conv2d(8, 4, 1)).eval()
    weight = norm.weight
    shrink(model, image(2), masks_of(model))
    assert type(model[1]) is type(norm)
    assert model[1].normalized_shape == (4,)
    if weight is not None:
        torch.testing.assert_close(model[1].weight, weight[KEPT])


@pytest.mark.parametrize("norm", [nn.LayerNorm((7, 7)), nn.LayerNorm(7), nn.RMSNorm((7, 7))], ids=repr)
def test_a_norm_over_places_stays(norm: nn.Module) -> None:
    model = between(2, norm)
    _, masked, after = shrink(model, image(2), masks_of(model))
    assert model[1].normalized_shape == norm.normalized_shape
    same(after, masked)


def test_a_norm_over_channels_and_places_loses_channels_alone() -> None:
    model = between(2, nn.LayerNorm((8, 7, 7)))
    weight = model[1].weight
    shrink(model, image(2), masks_of(model))
    assert model[1].normalized_shape == (4, 7, 7)
    torch.testing.assert_close(model[1].weight, weight[KEPT])
