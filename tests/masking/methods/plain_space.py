"""A masked parameter without NNI: its tensors lie in a plain object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_parameter import MaskedParameter


class PlainSpace:
    """Weights, scores and mask of one target."""

    sparse_ratio: float | None = None
    sparse_threshold: Any = None
    min_sparse_ratio: float | None = None
    max_sparse_ratio: float | None = None
    global_group_id: Any = None
    granularity: Any = None

    def __init__(self, weight: Tensor) -> None:
        self.target: Any = weight
        self.setting: dict[str, Any] = {}
        self.score: Any = None

    @property
    def own_mask(self) -> Tensor:
        return self._mask

    def start(self, score: nn.Parameter, mask: Tensor, parameter: Any, is_first: bool) -> None:
        self.score, self._mask = score, mask


def masked_parameter(weight: Tensor, score: nn.Parameter, kept: Tensor) -> MaskedParameter:
    """Return a masked parameter of single weights that keeps ``kept``."""
    parameter = MaskedParameter("", "weight", PlainSpace(weight), Grains(tuple(weight.shape)))
    parameter.set_initial(score, kept, is_first=True)
    return parameter


def small(weight: Tensor | None = None) -> MaskedParameter:
    """Return a masked parameter that keeps two of four weights."""
    weight = torch.tensor([[0.5, -2.0], [3.0, 0.1]]) if weight is None else weight
    kept = torch.tensor([[False, True], [True, False]])
    return masked_parameter(weight, nn.Parameter(torch.where(kept, 1.0, 0.95)), kept)
