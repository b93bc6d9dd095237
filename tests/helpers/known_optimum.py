"""A task whose best mask is known, and found with any order of floating-point sums; not a test.

Inputs are unit vectors, and labels are what the layer computes under the best mask: an output is one weight times
its mask ``m``, its label that weight times the best mask ``b``. The gradient of a score is then a positive number
times ``m - b``: never positive where the best mask keeps, never negative where it prunes, and zero only where the
mask is right, be the mask hard, soft or a sample; of grains, it is the sum over their weights. Scores that begin `SCORES` apart (0.05) change places as soon
as they have moved that far, and do not change back.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import Batches
from torch import Tensor, nn

CONFIG_LIST: list[dict[str, Any]] = [{"op_types": ["Linear"], "sparse_ratio": 0.7}]
INPUTS, OUTPUTS = 20, 24


def three_of_ten(*grain: int) -> Tensor:
    """Return a mask with grains of a size, which keeps three of every ten."""
    rows, columns = OUTPUTS // grain[0], INPUTS // grain[1]
    kept = (torch.arange(rows * columns) * 7 % 10 < 3).view(rows, columns)
    return kept.repeat_interleave(grain[0], 0).repeat_interleave(grain[1], 1)


BEST = three_of_ten(1, 1)


def layer(best: Tensor = BEST) -> nn.Module:
    """Return a layer whose largest weights are outside the best mask, so that magnitude does not help."""
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False))
    signs = 1 - 2 * (torch.arange(INPUTS * OUTPUTS) % 2).view(OUTPUTS, INPUTS)
    model[0].weight.data = signs * torch.where(best, 1.0, 2.0)
    return model


def batches(best: Tensor = BEST) -> Batches:
    """Return all unit vectors in four batches, with the outputs that `layer` has to compute."""
    wanted = (layer(best)[0].weight.detach() * best).T
    return list(zip(torch.eye(INPUTS).split(5), wanted.split(5), strict=True))


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Return half the sum of squared errors."""
    return (model(batch[0]) - batch[1]).square().sum() / 2
