"""Criteria that look at the weights alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from nni_jackpot.masking.criteria.registry import Importance, register_criterion


@register_criterion("magnitude")
def magnitude(weights: Mapping[Hashable, Tensor]) -> Importance:
    """Return the importance ``|w|`` (Eq. 11)."""
    return {key: weight.detach().abs() for key, weight in weights.items()}


@register_criterion("random")
def random(weights: Mapping[Hashable, Tensor]) -> Importance:
    """Return an importance uniform in [0, 1) (Sec. 3.3, Random).

    Drawn from PyTorch's global CPU generator whatever the device, so that ``torch.manual_seed`` decides the
    mask and the same seed gives the same one on every device.
    """
    return {key: torch.rand(weight.shape).to(weight.device) for key, weight in weights.items()}
