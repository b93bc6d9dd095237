"""Lottery tickets: train, prune by magnitude, rewind the weights left to an early epoch, and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nni_jackpot.runtime.settings import between, option
from nni_jackpot.training.method import DENSE, Start, Step, TrainingMethod, register_training_method
from nni_jackpot.training.rounds import keep_most, kept_after


@register_training_method("lt")
@dataclass(frozen=True, kw_only=True)
class LT(TrainingMethod):
    """Prune iteratively by magnitude, with rewinding (Frankle and Carbin 2019, Sec. 2; Frankle et al. 2020).

    The magnitudes of all layers are ranked together. Rewinding returns to all weights and statistics of the
    network at the early epoch, and drops the optimizer's momentum. Here every training after a round has its
    full length, with a schedule of the learning rate from the start.
    """

    paper: ClassVar[Start] = Start(DENSE)

    rounds: int = option(
        "how often weights are pruned, each time the same share of those left, with a training before each "
        "round and after the last; 10 rounds to 90 % zeros are the paper's 20 % a round",
        between(1, 1000),
        10,
    )
    rewind: int = option("epoch whose weights the pruned network returns to", between(0, 10**6), 1)

    @property
    def trainings(self) -> int:
        """One more than rounds."""
        return self.rounds + 1

    def begin(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], step: Step) -> None:
        """Remember the weights of epoch 0, if the network is to return to these."""
        if self.rewind == 0:
            _remember(step)

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Remember the network after the early epoch; after each training but the last, prune and rewind."""
        length = step.total // self.trainings
        if step.number == min(self.rewind * step.per_epoch, length):
            _remember(step)
        done, rest = divmod(step.number, length)
        if rest or done > self.rounds:
            return
        magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
        keep_most(masks, magnitudes, kept_after(done, self.rounds, masks, step.budgets))
        assert step.network is not None
        assert step.optimizer is not None
        step.network.load_state_dict(step.memory["early"])
        step.optimizer.state.clear()


def _remember(step: Step) -> None:
    assert step.network is not None
    step.memory["early"] = {name: value.clone() for name, value in step.network.state_dict().items()}
