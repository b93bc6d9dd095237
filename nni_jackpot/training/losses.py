"""Losses of a few batches, for criteria that a training ranks by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masking.criteria import Losses
from nni_jackpot.modules.batch_norm import preserve_stats
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.runtime.resume import same_random_states


def losses_on(
    model: nn.Module, batches: Iterable[Any], training_step: Callable[[Any, nn.Module], Tensor]
) -> Losses:
    """Return the losses of a model in training mode; modes, statistics and random states do not change.

    Parameters
    ----------
    model
        The network.
    batches
        The batches, the same in every pass.
    training_step
        Returns the loss of a batch and the model.
    """

    def losses(visit: Callable[[Tensor], None]) -> None:
        with same_random_states(), preserve_stats(model), restored_modes(model), torch.enable_grad():
            model.train()
            for batch in batches:
                visit(training_step(batch, model))

    return losses
