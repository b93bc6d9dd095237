"""GraSP: masks that preserve the gradient's flow at random weights, once, before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nni_jackpot.training.method import Start, TrainingMethod, register_training_method


@register_training_method("grasp")
@dataclass(frozen=True, kw_only=True)
class GraSP(TrainingMethod):
    """Train under masks by gradient flow in random weights (Wang et al. 2020, Sec. 4, Algorithm 1).

    The scores of all layers are ranked together.
    """

    paper: ClassVar[Start] = Start("grasp", "global_rank")
