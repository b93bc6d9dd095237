"""SNIP: masks by the loss's sensitivity at random weights, once, before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nni_jackpot.training.method import Start, TrainingMethod, register_training_method


@register_training_method("snip")
@dataclass(frozen=True, kw_only=True)
class SNIP(TrainingMethod):
    """Train under masks by connection sensitivity in random weights (Lee et al. 2019, Sec. 4, Algorithm 1).

    The sensitivities of all layers are ranked together.
    """

    paper: ClassVar[Start] = Start("snip", "global_rank")
