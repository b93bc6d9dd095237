"""The pruning criteria that a search can start from (Appendix A): targets in, importance out.

A criterion maps the weights of all targets at once to importances of the same shapes; larger means more
important. All targets at once, because some criteria need the whole network's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Importance: TypeAlias = dict[Hashable, Tensor]
Criterion: TypeAlias = Callable[[Mapping[Hashable, Tensor]], Importance]


def magnitude(weights: Mapping[Hashable, Tensor]) -> Importance:
    """Importance ``|w|`` (Eq. 11)."""
    return {key: weight.detach().abs() for key, weight in weights.items()}


def random(weights: Mapping[Hashable, Tensor]) -> Importance:
    """Importance uniform in [0, 1) (Sec. 3.3, Random).

    Drawn from PyTorch's global CPU generator whatever the device, so that ``torch.manual_seed`` decides the
    mask and the same seed gives the same one on every device.
    """
    return {key: torch.rand(weight.shape).to(weight.device) for key, weight in weights.items()}


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "random": random}
