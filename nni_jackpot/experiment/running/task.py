"""The task of a run: classification of images, or what a network of transformers is for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """What a network computes.

    Attributes
    ----------
    measures
        Names of the measures (`nni_jackpot.experiment.measures.MEASURES`), the main one first.
    has_labels
        Whether batches have labels, so that `loss` exists.
    """

    measures: tuple[str, ...]
    has_labels: bool

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the loss of a batch by its labels; NNI's ``training_step``."""

    def measure(self, model: nn.Module, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
        """Return the measures of a model on test batches, by name; the model's mode is preserved."""
