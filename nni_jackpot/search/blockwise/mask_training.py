"""Train masks, and keep the best ones on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.methods.method import MOMENTUM
from nni_jackpot.runtime.settings import SEED, Rule, between, option, validate
from nni_jackpot.search.blockwise.scores import ScoreTraining

STEPS = between(0, 10**9)
RATE = Rule("> 0 and <= 1e6", lambda value: 0 < value <= 1e6)
CHECKS = between(1, 10**9)
_SHARE = Rule("> 0 and < 1", lambda value: 0 < value < 1)

OnCheck = Callable[[int, float], None]
"""Called with the number of steps and the loss on the held-out batches."""


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """Settings of a training of masks.

    Attributes
    ----------
    steps
        Number of steps, of one batch each; 0 keeps the masks of the start.
    lr, momentum
        Of the SGD that trains the scores, whose mean size is 1 at the start.
    checks
        How often the masks are compared on the held-out batches.
    held_out
        Share of the batches that masks are compared on, and not trained on; one batch at least.
    seed
        Decides the order of batches.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    steps: int = option("steps, of one batch each; 0 to keep the masks of the start", STEPS, 100)
    lr: float = option("learning rate of the scores at the start", RATE, 0.01)
    momentum: float = option("momentum of the SGD that trains the scores", MOMENTUM, 0.9)
    checks: int = option("how often masks are compared on the held-out batches", CHECKS, 4)
    held_out: float = option("share of the batches that masks are compared on", _SHARE, 0.1)
    seed: int = option("decides the order of batches", SEED, 0)

    def __post_init__(self) -> None:
        validate(self)


class TrainedMasks(NamedTuple):
    """The best masks of a training.

    Attributes
    ----------
    kept
        The masks: boolean, of the scores' shapes.
    start_loss, loss
        Loss on the held-out batches, of the masks at the start and of the best ones.
    """

    kept: dict[str, Tensor]
    start_loss: float
    loss: float


def train_masks(
    training: ScoreTraining,
    order: Sequence[int],
    checks: int,
    loss_of: Callable[[int, dict[str, Tensor]], Tensor],
    held_out_loss: Callable[[dict[str, Tensor]], float],
    on_check: OnCheck | None = None,
) -> TrainedMasks:
    """Train masks, and return those with the smallest loss on held-out batches, the start included.

    Parameters
    ----------
    training
        The scores, and the masks of the start.
    order
        The batch of every step.
    checks
        How often the masks are compared.
    loss_of
        Returns the loss of a batch under masked weights.
    held_out_loss
        Returns the loss of the held-out batches under masked weights.
    on_check
        Called at the start and at each check.

    Raises
    ------
    SearchDivergedError
        If a loss is NaN or infinite.
    """

    def check(step: int) -> float:
        with torch.no_grad():
            loss = held_out_loss(training.masked())
        if not math.isfinite(loss):
            raise SearchDivergedError(f"the loss on the held-out batches is {loss} after {step} steps")
        if on_check is not None:
            on_check(step, loss)
        return loss

    best, lowest = dict(training.kept), check(0)
    start_loss = lowest
    every = max(1, len(order) // checks)
    for step, batch in enumerate(order, 1):
        training.step(loss_of(batch, training.masked()))
        if step % every == 0 or step == len(order):
            loss = check(step)
            if loss < lowest:
                best, lowest = dict(training.kept), loss
    return TrainedMasks(best, start_loss, lowest)


def held_out_of(n: int, share: float) -> tuple[list[int], list[int]]:
    """Return the batches to train on, and those to compare masks on; a single batch serves for both."""
    held_out = max(1, round(n * share))
    return list(range(n - held_out)) or [0], list(range(n - held_out, n))


def order_of(batches: Sequence[int], steps: int, seed: int) -> list[int]:
    """Return the batch of every step: all batches in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return order[:steps]
