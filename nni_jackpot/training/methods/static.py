"""Static masks: random ones, which stay."""

from __future__ import annotations

from dataclasses import dataclass

from nni_jackpot.training.method import TrainingMethod, register_training_method


@register_training_method("static")
@dataclass(frozen=True, kw_only=True)
class Static(TrainingMethod):
    """Train under random masks that stay, the control of all others (Evci et al. 2020, Sec. 4, "Static").

    All settings are those of the training.
    """
