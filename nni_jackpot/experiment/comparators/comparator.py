"""What a comparator consists of: settings, and how masks change while weights train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.runtime.registry import Registry
from nni_jackpot.runtime.settings import one_of, option


@dataclass(frozen=True)
class Step:
    """The state of a training after an optimizer step.

    Attributes
    ----------
    number, total
        Steps taken, and steps of the whole training.
    lr
        Learning rate of the step.
    momentum
        Momentum buffers of the optimizer by name of the weight; those that exist.
    memory
        What the comparator keeps from one step to the next: tensors and plain data, saved in checkpoints.
    seed
        Seed of the run.
    budgets
        Numbers of kept weights by name, as of the masks that the search starts from, or of the jackpot's.
    """

    number: int
    total: int
    lr: float
    momentum: Mapping[str, Tensor]
    memory: dict[str, Any]
    seed: int = 0
    budgets: Mapping[str, int] = field(default_factory=dict)

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, which depends on seed and step alone: equal on all processes."""
        state = np.random.SeedSequence((self.seed, self.number)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True, kw_only=True)
class Comparator(TrainConfig):
    """Settings of a method that trains weights under masks; each method is a subclass in its own file.

    Attributes
    ----------
    name
        Name under which the comparator is registered, and the kind of its row.
    """

    name: ClassVar[str]

    start: str = option(
        "masks at the start: the initial masks of the search, the jackpot's, or none (dense)",
        one_of(("initial", "jackpot", "dense")),
        "initial",
    )
    from_scratch: bool = option(
        "whether weights start from random values in place of the pre-trained ones", default=False
    )

    def update(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        step: Step,
    ) -> None:
        """Change masks, and weights, in place after an optimizer step; by default masks stay fixed.

        The training then sets pruned weights to zero, resets the momentum of weights that a mask adds or
        removes, and sends the masks of the first process to all others.

        Parameters
        ----------
        masks
            Boolean, True for kept weights, by name of the parameter.
        weights
            The parameters; pruned weights are zero before the optimizer step.
        gradients
            Gradients of the loss by all weights, pruned ones included; averaged over all processes.
        step
            The state of the training.
        """


COMPARATORS: Registry[type[Comparator]] = Registry("comparator")
register_comparator = COMPARATORS.register_class
