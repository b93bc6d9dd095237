"""Checkpoints of a search inside a training loop, from which an interrupted search resumes.

A resumed search ends with the masks of an uninterrupted one. The training loop belongs to the user, so
nothing can jump into the middle of it. Instead the loop is replayed from its start, with the random states of
its start, but without forward and backward passes. At the step of the checkpoint, loaders, schedulers and
counters have their former states; scores, masks, optimizers, statistics and random states are then restored.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_jackpot.errors import CheckpointError
from nni_jackpot.runtime.distributed import all_gather, barrier, rank, world_size
from nni_jackpot.runtime.plain import as_plain
from nni_jackpot.runtime.resume import (
    damage_told,
    digest,
    random_states,
    read_state,
    remove_files,
    set_random_states,
    write_state,
)
from nni_jackpot.search.saved_search import check_saved

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

    from nni_jackpot.search.driven_search import TrainingLoop
    from nni_jackpot.search.loop import Search

_logger = logging.getLogger(__name__)


class Checkpoint:
    """A file that a search writes regularly, resumes from, and removes at its end unless told to keep it.

    Parameters
    ----------
    path
        The file; in distributed training rank 0 writes it and all ranks read it.
    every
        Number of steps between two checkpoints.
    settings
        Further settings that the search depends on, by name; a file with other settings is refused.
    keep
        Whether the file stays at the end, and is that of the last step where the length is known in steps.
    minutes
        Time between two checkpoints, if the steps take longer.
    beside
        An object whose state is saved and restored along with the search, such as a log.

    Attributes
    ----------
    resumed_step
        Step that the search has resumed from; 0 if it began from the start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int,
        settings: Mapping[str, Any],
        keep: bool,
        minutes: float = math.inf,
        beside: Stateful | None = None,
    ) -> None:
        self.path = Path(path)
        self.resumed_step = 0
        self._every = every
        self._keep = keep
        self._minutes = minutes
        self._beside = beside
        self._settings = as_plain(settings, "settings")
        self._is_read_back = False
        self._searches = 0
        self._saved: dict[str, Any] | None = None

    @property
    def replaying(self) -> bool:
        """Whether the loop is being replayed up to the step of the checkpoint."""
        return self._saved is not None

    def begin(
        self,
        search: Search,
        training: TrainingLoop,
        model: nn.Module,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        """Follow a search that has begun; raises CheckpointError if the file belongs to another search."""
        if training.steps_by_hand:
            raise CheckpointError("a checkpoint of the search needs Lightning's automatic optimization")
        self._searches += 1
        self._search, self._model = search, model
        self._depends_on = {
            "max_steps": max_steps,
            "max_epochs": max_epochs,
            "number of the search": self._searches,
            "targets": {str(m): list(m.weight.shape) for group in search.groups for m in group.members},
            "weights": digest(p for p in model.parameters() if not p.requires_grad),
            "method": search.method.name,
            **search.schedule.settings._asdict(),
            **_settings_of(search.optimizer),
            **self._settings,
        }
        as_plain(search.optimizer.state_dict(), "the state of the optimizer")  # raises before any work
        self._losses = 0
        self._written_at = time.monotonic()
        self._may_skip = True
        self._random_start = random_states()
        self.resumed_step = 0
        if self.path.exists():
            saved = read_state(self.path, "search", self._depends_on)
            check_saved(self.path, saved, search, model)
            if self._beside is not None:
                self._beside.load_state_dict(saved.get("beside", {}))
            self._saved = saved
            self._random_start = saved["random_start"][rank()]
            with damage_told(self.path):
                set_random_states(self._random_start)
            self._may_skip = saved["may_skip"]
            self.resumed_step = saved["clock"]["step"]
            self._warn_of_other_sums(saved["sums"])
        owner, name = training.training_step
        setattr(owner, name, self._follow(getattr(owner, name)))

    def after_step(self, driver: Optimizer) -> None:
        """Write the file if it is due, or restore its state if the replay has come to its step."""
        clock = self._search.clock
        if self._saved is None:
            is_last = self._keep and clock.step == clock.max_steps
            if clock.step % self._every == 0 or is_last or self._is_overdue():
                self._write(driver)
        elif self._losses == self._saved["losses"]:
            self._restore(self._saved, driver)
            self._saved = None

    def _is_overdue(self) -> bool:
        """Return True if the last checkpoint is too old; distributed processes count steps only."""
        return world_size() == 1 and time.monotonic() - self._written_at > 60 * self._minutes

    def end(self) -> None:
        """End the search; raises CheckpointError if the replay has not reached the step of the checkpoint."""
        if self._saved is not None:
            raise self._another_course()
        if not self._keep:
            self.remove()

    def remove(self) -> None:
        """Remove the file, if it is there."""
        remove_files(self.path)

    def _follow(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*args: Any, **kwargs: Any) -> Any:
            self._losses += 1
            if self._saved is None:
                return self._watch(lambda: training_step(*args, **kwargs))
            if self._losses > self._saved["losses"]:
                raise self._another_course()
            # Gradients of zero, and not none, since a gradient scaler wants to have seen some.
            loss = min((group.score for group in self._search.groups), key=Tensor.numel).sum() * 0
            if self._may_skip:
                return loss
            with torch.no_grad():
                output = training_step(*args, **kwargs)
            return _with_loss(output, loss)

        return followed

    def _watch(self, training_step: Callable[[], Any]) -> Any:
        """Compute a loss, and note whether a replay may skip the computation.

        It may if the training step returns only a loss and draws no random numbers, as dropout does: the
        loader's random numbers would depend on them.
        """
        if not self._may_skip:
            return training_step()
        before = random_states()
        output = training_step()
        self._may_skip = isinstance(output, Tensor) and random_states() == before
        return output

    def _another_course(self) -> CheckpointError:
        return CheckpointError(
            f"the training loop does not reach the step at which {self.path} was written: the loop or the "
            "data differ. Run the former loop, or remove the file to start from the beginning"
        )

    # -- what the file holds

    def _write(self, driver: Optimizer) -> None:
        search = self._search
        searched = {id(member.mask) for group in search.groups for member in group.members}
        shared = {parameter.data_ptr() for parameter in self._model.parameters()}
        state = {
            "losses": self._losses,
            "may_skip": all(all_gather(self._may_skip)),
            **search.state_dict(),
            "trained": {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad},
            "buffers": {
                name: buffer
                for name, buffer in self._model.named_buffers()
                if id(buffer) not in searched and buffer.data_ptr() not in shared
            },
            "driver": driver.state_dict(),
            "random_start": all_gather(self._random_start),
            "random": all_gather(random_states()),
            "sums": self._sums(),
            "beside": {} if self._beside is None else self._beside.state_dict(),
        }
        write_state(self.path, self._depends_on, state)
        if not self._is_read_back:  # finds an unreadable file now, and not when it is needed
            barrier()
            check_saved(self.path, read_state(self.path, "search", self._depends_on), search, self._model)
            self._is_read_back = True
        self._written_at = time.monotonic()

    def _sums(self) -> dict[str, Any]:
        """Return what the order of sums, and so the last digits of all numbers, depends on."""
        device = self._search.groups[0].score.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"device": name, "threads": torch.get_num_threads()}

    def _warn_of_other_sums(self, saved: dict[str, Any]) -> None:
        if saved != (own := self._sums()):
            _logger.warning(
                "the search began with %s and resumes with %s: sums in another order may change the mask",
                saved,
                own,
            )

    def _restore(self, saved: dict[str, Any], driver: Optimizer) -> None:
        model = self._model
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        with torch.no_grad():
            for name, value in saved["trained"].items():
                parameters[name].copy_(value)
            for name, value in saved["buffers"].items():
                if name in buffers and buffers[name].shape == value.shape:
                    buffers[name].copy_(value)
                else:  # the mask of an input or output, whose shape only a forward shows
                    owner, _, leaf = name.rpartition(".")
                    model.get_submodule(owner)._buffers[leaf] = value.to(next(model.parameters()).device)
        with damage_told(self.path):
            self._search.load_state_dict(saved)
            driver.load_state_dict(saved["driver"])
            set_random_states(saved["random"][rank()])


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": loss}
    return (loss, *output[1:]) if isinstance(output, Sequence) else loss


def _settings_of(optimizer: Optimizer) -> dict[str, str]:
    settings = {name: repr(value) for name, value in optimizer.param_groups[0].items() if name != "params"}
    return {"optimizer": type(optimizer).__name__, **settings}
