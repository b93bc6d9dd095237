"""A task whose best mask is known, and found in any order of sums; no test of its own.

Inputs are unit vectors, and labels are what the layer computes under the best mask: an output is one weight times
its mask ``m``, its label that weight times the best mask ``b``. The gradient of a score is then a positive number
times ``m - b``: never positive where the best mask keeps, never negative where it prunes, and zero only where the
mask is right, be the mask hard, soft or a sample. Scores that begin `SCORES` apart (0.05) change places as soon
as they have moved that far, and do not change back.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import Batches
from torch import Tensor, nn

CONFIG_LIST: list[dict[str, Any]] = [{"op_types": ["Linear"], "sparse_ratio": 0.7}]
INPUTS, OUTPUTS = 20, 24


def best_mask() -> Tensor:
    """Return a mask that keeps three of every ten weights."""
    return (torch.arange(INPUTS * OUTPUTS) * 7 % 10 < 3).view(OUTPUTS, INPUTS)


def layer() -> nn.Module:
    """Return a layer whose largest weights are all others than the best mask's, so that magnitude is no help."""
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    signs = 1 - 2 * (torch.arange(INPUTS * OUTPUTS) % 2).view(OUTPUTS, INPUTS)
    model[0].weight.data = signs * torch.where(best_mask(), 1.0, 2.0)
    return model


def batches() -> Batches:
    """Return all unit vectors, in four batches, and what `layer` is to compute of them."""
    wanted = (layer()[0].weight.detach() * best_mask()).T
    return list(zip(torch.eye(INPUTS).split(5), wanted.split(5), strict=True))


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Return half the sum of squared errors."""
    return (model(batch[0]) - batch[1]).square().sum() / 2
