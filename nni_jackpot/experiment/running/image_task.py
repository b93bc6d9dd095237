"""Classification of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.experiment.train import accuracy, cross_entropy_step


class ImageTask:
    """Images with labels.

    Attributes
    ----------
    measures
        Names of the measures (`nni_jackpot.experiment.measures.MEASURES`), the main one first.
    has_labels
        Whether batches have labels, so that `loss` exists.
    """

    measures: tuple[str, ...] = ("accuracy",)
    has_labels = True

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the cross-entropy of a batch; NNI's ``training_step``."""
        return cross_entropy_step(batch, model)

    def measure(self, model: nn.Module, batches: Any, device: torch.device) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": accuracy(model, batches, device)}
