"""What a sparse training consists of: settings, and how masks change while weights train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_jackpot.masking.criteria import Losses
from nni_jackpot.runtime.registry import Registry
from nni_jackpot.runtime.settings import validate

DENSE = "dense"


@dataclass(frozen=True)
class Start:
    """Where a training starts in its paper.

    Attributes
    ----------
    masks
        Criterion of the masks, by name, or ``"dense"`` for no zeros.
    budget
        How the weights are shared out among layers, by the name of a budget.
    from_scratch
        Whether weights start from random values, and not from pre-trained ones.
    """

    masks: str = "random"
    budget: str = "erdos_renyi_kernel"
    from_scratch: bool = True


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
        What the method keeps from one step to the next: tensors and plain data, saved in checkpoints.
    seed
        Seed of the training.
    budgets
        Numbers of kept weights by name, as of the masks that the training was given.
    epochs
        Passes over the data in the whole training.
    network, optimizer
        The network with all its weights, and what trains them; for a method that returns to earlier weights.
    losses
        Losses of a few batches, for criteria that need them; None if the training has none.
    """

    number: int
    total: int
    lr: float
    momentum: Mapping[str, Tensor]
    memory: dict[str, Any]
    seed: int = 0
    budgets: Mapping[str, int] = field(default_factory=dict)
    epochs: int = 1
    network: nn.Module | None = None
    optimizer: Optimizer | None = None
    losses: Losses | None = None

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return max(1, self.total // max(1, self.epochs))

    def is_due(self, every: int | None) -> bool:
        """Return whether an update is due: after every n-th step of the training but the last.

        Parameters
        ----------
        every
            The number n; None for the steps of an epoch.
        """
        return self.number % (every or self.per_epoch) == 0 and self.number < self.total

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, which depends on seed and step alone: equal on all processes."""
        state = np.random.SeedSequence((self.seed, self.number)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """Settings of a method that trains weights under masks; each method is a subclass in a separate file.

    Attributes
    ----------
    name
        Name under which the method is registered.
    paper
        Where the method's paper starts.
    needs_losses
        Whether the method ranks by losses of a few batches (`SparseTraining`).
    """

    name: ClassVar[str]
    paper: ClassVar[Start] = Start()
    needs_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        validate(self)

    @property
    def is_dense_at_start(self) -> bool:
        """Whether the training starts without zeros, and takes the numbers of kept weights from the masks."""
        return self.paper.masks == DENSE

    @property
    def trainings(self) -> int:
        """How many trainings of full length there are, each with a learning rate's schedule of its own."""
        return 1

    def begin(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], step: Step) -> None:
        """Change masks in place before the first step; by default they stay.

        Parameters
        ----------
        masks, weights, step
            As for `update`; the number of the step is 0.
        """

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
            The parameters; pruned weights are zero.
        gradients
            Gradients of the loss by all weights, pruned ones included; averaged over all processes.
        step
            The state of the training.
        """


TRAINING_METHODS: Registry[type[TrainingMethod]] = Registry("training method")
register_training_method = TRAINING_METHODS.register_class
