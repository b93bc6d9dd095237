"""Batch-norm statistics of final masks, collected in the last phase of a search."""

from __future__ import annotations

from typing import Any

from torch import nn


class FinalStatistics:
    """Let batch norm forget the statistics of soft masks once masks are hard.

    Running statistics lag behind: after a short search they are mostly those of soft masks. From `start` on
    they are the plain mean over the batches since.

    Parameters
    ----------
    model
        The model that is searched.
    """

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = list(model.modules())
        self._layers: list[Any] = [
            m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        self._momenta = [layer.momentum for layer in self._layers]
        self._counts = self._batches()
        self._has_adapted = False
        self.is_started = False

    def _batches(self) -> list[int]:
        return [int(layer.num_batches_tracked) for layer in self._layers]

    def start(self, is_resumed: bool = False) -> None:
        """Begin with the next batch of each layer; after a resume, continue the mean that was begun."""
        if self.is_started:
            return
        self.is_started = True
        self._has_adapted = is_resumed or self._batches() != self._counts
        for layer in self._layers:
            layer.momentum = None  # a plain mean instead of a moving one
            if not is_resumed:
                layer.num_batches_tracked.zero_()

    @property
    def are_missing(self) -> bool:
        """Whether layers have statistics of soft masks, and none of the final masks."""
        if self.is_started:
            return self._has_adapted and not any(self._batches())
        return self._batches() != self._counts

    def stop(self) -> None:
        """Give the layers their momentum back."""
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
        self.is_started = False
