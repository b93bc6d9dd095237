"""Optimal brain damage: prune by saliency, from the diagonal of the loss's Hessian, and retrain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nni_jackpot.masking.criteria import obd
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.training.initial import importance_of
from nni_jackpot.training.method import DENSE, Start, Step, TrainingMethod, register_training_method
from nni_jackpot.training.rounds import keep_most, kept_after


@register_training_method("obd")
@dataclass(frozen=True, kw_only=True)
class OBD(TrainingMethod):
    """Prune trained weights by saliency ``h w^2 / 2`` and retrain (LeCun et al. 1990, Sec. 2.2).

    The saliencies of all layers are ranked together. One round is the one-shot form; with more, the network
    is pruned, retrained, ranked and pruned again.
    """

    paper: ClassVar[Start] = Start(DENSE, from_scratch=False)
    needs_losses: ClassVar[bool] = True

    rounds: int = option(
        "how often weights are pruned, each time the same share of those left; a training follows each round",
        between(1, 1000),
        1,
    )

    @property
    def trainings(self) -> int:
        """As many as rounds."""
        return self.rounds

    def begin(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], step: Step) -> None:
        """Prune the trained network for the first time."""
        self._prune(1, masks, weights, step)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Prune after each training but the last, and drop the optimizer's momentum."""
        done, rest = divmod(step.number, step.total // self.trainings)
        if rest or done >= self.rounds:
            return
        self._prune(done + 1, masks, weights, step)
        assert step.optimizer is not None
        step.optimizer.state.clear()

    def _prune(
        self, number: int, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], step: Step
    ) -> None:
        saliency = importance_of(obd, weights, step.losses)
        keep_most(masks, saliency, kept_after(number, self.rounds, masks, step.budgets))
