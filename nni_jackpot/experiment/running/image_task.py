"""Classification of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.experiment.train import cross_entropy_step, top_accuracies

_FEW = 10  # classes, of which five say little


class ImageTask:
    """Images with labels.

    Parameters
    ----------
    classes
        Number of classes; of more than ten, top-5 accuracy is measured as well.

    Attributes
    ----------
    measures
        Names of the measures (`nni_jackpot.experiment.measures.MEASURES`), the main one first.
    has_labels
        Whether batches have labels, so that `loss` exists.
    """

    has_labels = True

    def __init__(self, classes: int) -> None:
        self._tops = {"accuracy": 1, "top5": 5} if classes > _FEW else {"accuracy": 1}
        self.measures: tuple[str, ...] = tuple(self._tops)

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the cross-entropy of a batch; NNI's ``training_step``."""
        return cross_entropy_step(batch, model)

    def measure(self, model: nn.Module, batches: Any, device: torch.device) -> dict[str, float]:
        """Return the accuracy, and that of the five likeliest classes."""
        found = top_accuracies(model, batches, device, *self._tops.values())
        return dict(zip(self._tops, found, strict=True))
