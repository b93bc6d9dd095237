"""The best masks of a search, by a loss that is measured on the same batches every time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from nni_jackpot.masking.refresh import build_caches
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.modules.tuned import TunedParameters

_logger = logging.getLogger(__name__)

# Step of the first comparison; each further one follows after twice as many steps.
_FIRST = 4
# What the learning rate is divided by where masks have become worse than those of the start.
DIVISOR = 10.0


class BestMasks:
    """The masks that a search may end with: the best that it has compared, those of the start at worst.

    Parameters
    ----------
    groups
        What is searched, with refreshed masks: those of the start, and the best so far.
    initial_scores
        Scores of kept and of pruned grains, for the return to the best masks.
    finds_lr
        Whether masks are compared during the search as well, and the learning rate is lowered where they have
        become worse than those of the start. Training must see the masks themselves, at full sparsity.
    tuned
        Parameters that are trained along: masks are kept with the values that they have at that moment.
    """

    def __init__(
        self,
        groups: list[ScoreGroup],
        initial_scores: tuple[float, float],
        finds_lr: bool,
        tuned: TunedParameters | None = None,
    ) -> None:
        self._groups = groups
        self._initial_scores = initial_scores
        self._next = _FIRST if finds_lr else None
        self._loss_of_start: float | None = None
        self._loss: float | None = None
        self._tuned = tuned
        self._kept, self._values = self._current(), self._values_now()

    def is_due(self, step: int) -> bool:
        """Return True if masks are to be compared after ``step`` steps."""
        return self._next is not None and step >= self._next

    def compare(self, measure: Callable[[], float], optimizer: Optimizer) -> None:
        """Compare the current masks with the best; return to the best, more slowly, if the start was better.

        Parameters
        ----------
        measure
            Returns the loss under the current masks.
        optimizer
            Moves the scores. A return divides its learning rates, and clears its momentum.
        """
        assert self._next is not None
        step, self._next = self._next, 2 * self._next
        if self._loss_of_start is None:
            with self._shown():
                self._loss = self._loss_of_start = measure()
        assert self._loss is not None
        loss = measure()
        if loss <= self._loss:
            self._loss, self._kept, self._values = loss, self._current(), self._values_now()
        elif not loss <= self._loss_of_start:
            self._return()
            optimizer.state.clear()
            for param_group in optimizer.param_groups:
                param_group["initial_lr"] /= DIVISOR
            if self._tuned is not None:
                self._tuned.slow_down(DIVISOR)
            rate = optimizer.param_groups[0]["initial_lr"]
            _logger.info(
                "after %d steps the loss is %.4g, and that of the start's masks %.4g: the search returns to "
                "its best masks, with lr %.2g",
                *(step, loss, self._loss_of_start, rate),
            )

    def choose(self, measure: Callable[[], float]) -> bool:
        """End with the best masks, if the current ones are worse; return whether masks were replaced."""
        loss = measure()
        with self._shown():
            best = measure()
        if not loss > best and not np.isnan(loss):
            return False
        self._return()
        _logger.warning(
            "the search ends with its best masks so far, since its last ones are worse: loss %.4g, and %.4g "
            "under the best. A longer search or another lr may help",
            *(loss, best),
        )
        return True

    def _current(self) -> list[Tensor]:
        """Return the masks now, eight grains to a byte."""
        kept = [group.grains.of_mask(group.members[0].mask).reshape(-1) for group in self._groups]
        return [torch.from_numpy(np.packbits(k.cpu().numpy())) for k in kept]

    def _values_now(self) -> list[Tensor]:
        return [] if self._tuned is None else self._tuned.values()

    def _return(self) -> None:
        if self._tuned is not None:
            self._tuned.restore(self._values)
        for group, packed in zip(self._groups, self._kept, strict=True):
            kept = _unpacked(group, packed).to(group.score.device)
            group.set_initial(kept, *self._initial_scores)
            group.set_mode(is_searched=True)
        build_caches([member for group in self._groups for member in group.members])

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Let the model compute with the best masks in the block."""
        members = [member for group in self._groups for member in group.members]
        scores = [group.score.detach().clone() for group in self._groups]
        states = [{**member.state_dict(), "mask": member.mask.clone()} for member in members]
        modes = [(member.mode, member.is_read) for member in members]
        values = self._values_now()
        self._return()
        try:
            yield
        finally:
            if self._tuned is not None:
                self._tuned.restore(values)
            with torch.no_grad():
                for group, score in zip(self._groups, scores, strict=True):
                    group.score.copy_(score)
                for member, state, (mode, is_read) in zip(members, states, modes, strict=True):
                    member.load_state_dict(state)
                    member.mode, member.is_read = mode, is_read
            build_caches(members)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the best masks, and what is known about losses."""
        return {
            "kept": self._kept,
            "values": self._values,
            "loss": self._loss,
            "loss_of_start": self._loss_of_start,
            "next": self._next,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, TypeError or LookupError for a state that this search cannot have had."""
        if state.keys() != self.state_dict().keys():
            raise ValueError("the best masks have other fields")
        kept = state["kept"]
        if type(kept) is not list or len(kept) != len(self._kept):
            raise ValueError("the best masks belong to other targets")
        for group, now, packed in zip(self._groups, self._kept, kept, strict=True):
            is_like = isinstance(packed, Tensor) and (packed.shape, packed.dtype) == (now.shape, now.dtype)
            if not is_like or not packed.any():
                raise ValueError(f"the best mask of {group} has another shape or type, or keeps nothing")
            mask = _unpacked(group, packed)
            if not torch.equal(group.grains.select(mask.float(), int(mask.sum())), mask):
                raise ValueError(f"the best mask of {group} does not keep equally many in each row")
        if self._weights_kept(kept) != self._weights_kept(self._kept):
            raise ValueError("the best masks keep another number of weights")
        if self._tuned is not None:
            self._tuned.check_values(state["values"])
        for name in ("loss", "loss_of_start"):
            if state[name] is not None and type(state[name]) is not float:
                raise TypeError(f"{name} is not a number")
        following = state["next"]
        is_like = following is None if self._next is None else type(following) is int
        if not is_like:
            raise ValueError("the comparisons belong to another search")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._kept, self._values = list(state["kept"]), list(state["values"])
        self._next = state["next"]
        self._loss, self._loss_of_start = state["loss"], state["loss_of_start"]

    def _weights_kept(self, kept: list[Tensor]) -> int:
        return sum(
            int(_unpacked(group, packed).sum()) * group.weights // group.grains.count
            for group, packed in zip(self._groups, kept, strict=True)
        )


def _unpacked(group: ScoreGroup, packed: Tensor) -> Tensor:
    """Return the kept grains, boolean, of the score shape."""
    kept = np.unpackbits(packed.numpy(), count=group.grains.count)
    return torch.from_numpy(kept).bool().view(group.grains.score_shape)
