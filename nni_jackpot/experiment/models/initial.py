"""Random weights of one distribution for every network (Ramanujan et al., "What's Hidden...", 2020)."""

from __future__ import annotations

import math

import torch
from torch import nn

INITS = ("kaiming", "signed_constant")


@torch.no_grad()
def draw_weights(model: nn.Module, init: str) -> None:
    """Redraw the weights of all convolutions and linear layers, from PyTorch's global generator.

    Parameters
    ----------
    model
        The network, changed in place; biases and other parameters are not changed.
    init
        ``"kaiming"``: normal with variance 2 / fan_in. ``"signed_constant"``: the signs of such values times
        their standard deviation.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            weight = module.weight
            deviation = math.sqrt(2 / weight[0].numel())
            weight.normal_(0, deviation)
            if init == "signed_constant":
                weight.copy_(torch.full_like(weight, deviation).copysign(weight))
