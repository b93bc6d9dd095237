"""Losses under the current masks, measured on the same batches every time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nni_jackpot.modules.batch_norm import has_batch_norm, normalizing_by_batch, preserve_stats, reestimating
from nni_jackpot.runtime.distributed import all_gather
from nni_jackpot.runtime.resume import same_random_states


class HeldOut:
    """A loss that leaves no trace: statistics, modes and random states are restored.

    The model is in eval mode, except that batch norm normalizes by batch: running statistics belong to other
    masks.

    Parameters
    ----------
    model
        The wrapped model.
    adapts_norm
        Whether norm statistics follow the masks.
    loss_of
        Returns the loss; called without gradients.
    """

    def __init__(self, model: nn.Module, adapts_norm: bool, loss_of: Callable[[], Tensor | float]) -> None:
        self._model = model
        self._adapts_norm = adapts_norm and has_batch_norm(model)
        self._loss_of = loss_of

    def measure(self) -> float:
        """Return the loss, averaged over all processes."""
        with self._without_trace(), preserve_stats(self._model):
            losses = all_gather(float(self._loss_of()))
        return sum(losses) / len(losses)

    def reestimate_norm(self) -> None:
        """Re-estimate norm statistics by the forwards of one measurement, where they follow the masks."""
        if self._adapts_norm:
            with self._without_trace(), reestimating(self._model):
                self._loss_of()

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        with torch.no_grad(), same_random_states(), normalizing_by_batch(self._model):
            yield


class FirstSteps:
    """The first training steps of a loop, which can be computed again.

    Parameters
    ----------
    count
        Number of steps.
    training_step
        Computes the output of a training step from the arguments; the loss is the output, its first element
        or its element ``"loss"``.
    silenced
        Returns a context in which the training step logs nothing.
    """

    def __init__(
        self,
        count: int,
        training_step: Callable[..., Any],
        silenced: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._count = count
        self._step = training_step
        self._silenced = silenced
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a step, if it is one of the first."""
        if not self.are_complete:
            self._calls.append(_copied(args, kwargs))

    @property
    def are_complete(self) -> bool:
        """Whether all steps have been recorded."""
        return len(self._calls) == self._count

    def __len__(self) -> int:
        return len(self._calls)

    def loss(self) -> float:
        """Return the mean loss of the recorded steps under the current masks."""
        total = 0.0
        with self._silenced():
            for args, kwargs in self._calls:
                own_args, own_kwargs = _copied(args, kwargs)
                total += _loss_of(self._step(*own_args, **own_kwargs)).float().mean().item()
        return total / len(self._calls)


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with copies of all tensors and containers, which a step may change in place."""
    return tree_map(_copy, (args, kwargs))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, MutableMapping):  # such as a tokenizer's batch
        own = copy.copy(value)
        for key, inner in value.items():
            own[key] = _copy(inner)
        return own
    return value


def _loss_of(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["loss"]
    return output[0] if isinstance(output, Sequence) else output
