"""The section ``finetune`` of a run's YAML file."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nni_jackpot.experiment.comparators.comparator import Comparator
from nni_jackpot.experiment.comparators.tuned import InitialTuned, JackpotTuned
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.experiment.schema.training import EPOCHS, RATE, TrainConfig
from nni_jackpot.runtime.settings import one_of, option


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Tuning of weights under fixed masks, for comparison (Eq. 9)."""

    epochs: int = option("passes over the training data, 0 for no comparison", EPOCHS, 0)
    lr: float = option("learning rate at the start; required with epochs", RATE, None)
    under: str = option(
        "the masks: those that the search starts from, the jackpot's, or both, one after the other",
        one_of(("initial", "jackpot", "both")),
        "initial",
    )

    def __post_init__(self) -> None:
        if self.lr is None and self.epochs:
            raise Invalid("lr", "is missing, allowed: a number > 0, or epochs 0")
        if self.lr is None:
            object.__setattr__(self, "lr", 0.05)

    def comparators(self) -> dict[str, Comparator]:
        """Return the comparators that the section stands for, by name."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(TrainConfig)}
        made: list[Comparator] = []
        if self.epochs and self.under != "jackpot":
            made.append(InitialTuned(**own))
        if self.epochs and self.under != "initial":
            made.append(JackpotTuned(**own))
        return {comparator.name: comparator for comparator in made}
