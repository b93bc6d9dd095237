"""One search in time: steps that move the scores, and masks that follow a schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nni_jackpot.errors import JackpotError, NothingSearchedError, SearchDivergedError
from nni_jackpot.masking.methods import Method
from nni_jackpot.masking.refresh import build_caches, refresh
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.modules.final_statistics import FinalStatistics
from nni_jackpot.modules.tuned import TunedParameters
from nni_jackpot.runtime.distributed import all_gather, world_size
from nni_jackpot.runtime.resume import digest
from nni_jackpot.search.best_masks.best_masks import BestMasks
from nni_jackpot.search.clock import SearchClock
from nni_jackpot.search.optimizers.fused_step import FusedStep
from nni_jackpot.search.sparsity_schedule import SparsitySchedule

_logger = logging.getLogger(__name__)


class Search:
    """A search: ``begin``, then one ``step`` after each backward pass, then ``finish``.

    Parameters
    ----------
    groups
        What is searched.
    optimizer
        Moves the scores; its learning rates are those at the start of the schedule.
    schedule
        Sets budgets and temperature over the search.
    lr_schedule
        Factor of the learning rate, and of the swap limit, at a progress in [0, 1].
    method
        Settings of the search; their initial scores serve the return to the last good masks.
    statistics
        Collects batch-norm statistics of the final masks after the soft ones; None to leave statistics alone.
    finds_lr
        Whether the search lowers a learning rate that makes its masks worse (`BestMasks`).
    compares
        Whether losses of masks will be measured; the best masks are kept only then.
    tuned
        Parameters that are trained along; None for none.

    Attributes
    ----------
    clock
        Progress of the search.
    lacks_statistics
        Whether a finished search has batch-norm statistics of soft masks, and none of the final masks.
    """

    def __init__(
        self,
        groups: list[ScoreGroup],
        optimizer: Optimizer,
        schedule: SparsitySchedule,
        lr_schedule: Callable[[float], float],
        method: Method,
        statistics: FinalStatistics | None,
        finds_lr: bool,
        compares: bool,
        tuned: TunedParameters | None = None,
    ) -> None:
        self.groups = groups
        self.optimizer = optimizer
        self.schedule = schedule
        self.clock = SearchClock(None, None)
        for param_group in optimizer.param_groups:
            param_group.setdefault("initial_lr", param_group["lr"])
        self._lr_schedule = lr_schedule
        self.method = method
        self._fused_step = FusedStep(optimizer, groups)
        self._statistics = statistics
        self.lacks_statistics = False
        self._finds_lr = finds_lr
        self._compares = compares
        self._tuned = tuned
        self._best: BestMasks | None = None
        self._parameters = [member for group in groups for member in group.members]
        self._without_gradient = list(groups)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; the initial one before the first."""
        return self.optimizer.param_groups[0]["lr"]

    # -- begin, step, finish

    def begin(self, max_steps: int | None, max_epochs: int | None = None) -> None:
        """Set the masks of the first step.

        Parameters
        ----------
        max_steps
            Length of the search in steps, if it is known.
        max_epochs
            Length in epochs, if the number of steps is not known (`SearchClock`).
        """
        self.clock = SearchClock(max_steps, max_epochs)
        for parameter in self._parameters:
            parameter.refresh()
        if self._compares:
            self._best = BestMasks(self.groups, self.method.initial_scores, self._finds_lr, self._tuned)
        self.schedule.follow(0.0)
        refresh(self._parameters)
        self._set_mode(is_searched=True)
        build_caches(self._parameters)

    def check_loss(self, loss: Tensor) -> None:
        """Accept the current masks: a divergence returns to the last masks that gave a finite loss.

        Raises
        ------
        SearchDivergedError
            If the loss is NaN or infinite.
        """
        if not torch.isfinite(loss).all():
            raise SearchDivergedError(f"the loss became {loss.detach().reshape(-1)[0].item()}")
        for group in self.groups:
            group.accept()
        if self._tuned is not None:
            self._tuned.accept()

    def step(self) -> None:
        """Move the scores by their gradients, drop the gradients, and update the masks.

        Raises
        ------
        SearchDivergedError
            If a score is NaN.
        NothingSearchedError
            In the first step, if the loss does not depend on the masks of targets that were read.
        JackpotError
            In the first step, if the processes of a distributed search have different gradients.
        """
        if self._without_gradient:
            self._look_for_gradients()
        if self.clock.step == 0 and world_size() > 1:
            self._compare_gradients()
        progress = self.clock.progress()
        factor = self._lr_schedule(progress)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["initial_lr"] * factor
        if self.schedule.settings.swap_limit is not None:
            for group in self.groups:
                group.limit_swaps(self.schedule.settings.swap_limit * factor)
        self.schedule.follow(progress)
        self._set_mode(is_searched=True)
        written = self._fused_step.take()
        if written is None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._tuned is not None:
            self._tuned.step(factor)
        refresh(self._parameters, written or ())
        if self._statistics is not None and self.schedule.is_hard_at(progress):
            self._statistics.start()
        self.clock.step += 1

    def compare_if_due(self, measure: Callable[[], float]) -> None:
        """Compare the masks with the best so far, if it is time to (`BestMasks.compare`)."""
        if self._best is not None and self._best.is_due(self.clock.step):
            self._best.compare(measure, self.optimizer)

    def choose(self, measure: Callable[[], float]) -> bool:
        """After `finish`, replace the masks by better ones of this search; return whether there were any."""
        return self._best is not None and self._best.choose(measure)

    def finish(self) -> None:
        """Update the masks a last time.

        Raises
        ------
        NothingSearchedError
            If there was no step.
        SearchDivergedError
            If a score is NaN.
        """
        if self.clock.step == 0:
            raise NothingSearchedError(
                "the search took no step: the training loop must call step() of the evaluator's first "
                "optimizer, which has the scores; a loop of your own calls search.step()"
            )
        if self._without_gradient:
            _logger.warning(
                "%s had no gradient in the whole search: their masks are those of the start",
                ", ".join(map(str, self._without_gradient)),
            )
        self.schedule.finish()
        self._set_mode(is_searched=True)
        refresh(self._parameters)  # deferred masks would report a NaN score only here
        self.lacks_statistics = self._statistics is not None and self._statistics.are_missing

    def warn_of_statistics(self) -> None:
        """Warn of statistics of soft masks; for callers that do not re-estimate them after `finish`."""
        if self.lacks_statistics:
            _logger.warning(
                "the search was too short for batch-norm statistics of the final masks: give compress() or "
                "finish() norm_batches, or call reestimate_norm()"
            )

    def close(self) -> None:
        """Leave masks that have all their zeros and follow the scores lazily, however the search ended."""
        self.schedule.finish()
        self._set_mode(is_searched=False)
        if self._statistics is not None:
            self._statistics.stop()

    def undo(self, error: SearchDivergedError) -> SearchDivergedError:
        """Return to the last masks that gave a finite loss; return the error to raise."""
        for group in self.groups:
            group.undo(*self.method.initial_scores)
        if self._tuned is not None:
            self._tuned.undo()
        return SearchDivergedError(
            f"{error} at step {self.clock.step + 1} of the search; the pruner keeps the last masks "
            "that gave a finite loss. Lower lr, or look at the data of that step"
        )

    def _set_mode(self, is_searched: bool) -> None:
        for group in self.groups:
            group.set_mode(is_searched)

    def _look_for_gradients(self) -> None:
        """Find the scores without a gradient: the loss does not depend on their masks.

        The first step raises NothingSearchedError for a target whose weight was read, or if no score has a
        gradient. A target that no forward has used yet, such as an expert or a branch, gets a warning.
        """
        self._without_gradient = [group for group in self._without_gradient if group.score.grad is None]
        if self.clock.step > 0 or not self._without_gradient:
            return
        read = [group for group in self._without_gradient if any(member.is_read for member in group.members)]
        if len(self._without_gradient) == len(self.groups):
            read = self._without_gradient
        if read:
            raise NothingSearchedError(
                f"{', '.join(map(str, read))} had no gradient in the first step: the loss does not depend on "
                "their masks. A body under torch.no_grad(), torch.utils.checkpoint with use_reentrant=True "
                "or an output that the loss leaves out does that; say use_reentrant=False, or leave the "
                "modules out by exclude_op_names"
            )
        _logger.warning(
            "%s had no gradient in the first step: no forward has used them yet",
            ", ".join(map(str, self._without_gradient)),
        )

    def _compare_gradients(self) -> None:
        """Check that all processes have the same gradients, without which their masks would differ."""
        grads = [group.score.grad for group in self.groups if group.score.grad is not None]
        grads += [] if self._tuned is None else self._tuned.gradients
        if len(set(all_gather(digest(grads)))) > 1:
            raise JackpotError(
                "the processes have different gradients of the scores, so their masks would differ: make the "
                "pruner first, and wrap the model by DistributedDataParallel after that"
            )

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return all that the search needs to continue, besides the scores and the norm statistics."""
        return {
            "clock": asdict(self.clock),
            "rankings": self.schedule.rankings,
            "masks": {str(parameter): parameter.state_dict() for parameter in self._parameters},
            "optimizer": self.optimizer.state_dict(),
            "best": {} if self._best is None else self._best.state_dict(),
            "tuned": {} if self._tuned is None else self._tuned.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, TypeError or LookupError for a state that this search cannot have had."""
        clock = state["clock"]
        if clock.keys() != {field.name for field in fields(SearchClock)}:
            raise ValueError("the clock has other fields")
        if not all(value is None or type(value) is int for value in clock.values()):
            raise TypeError("the clock holds a value that is not a number")
        if not 0 < clock["step"] <= (clock["max_steps"] or clock["step"]):
            raise ValueError(f"step {clock['step']} of {clock['max_steps']}")
        parameters = {str(parameter): parameter for parameter in self._parameters}
        if state["masks"].keys() != parameters.keys():
            raise ValueError("the masks are those of other targets")
        for name, parameter in parameters.items():
            parameter.check_state(state["masks"][name])
        if self._best is not None and state["best"]:
            self._best.check_state(state["best"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the scores have been restored before."""
        self.clock = SearchClock(**state["clock"])
        self.schedule.rankings = state["rankings"]
        with torch.no_grad():
            for parameter in self._parameters:
                parameter.load_state_dict(state["masks"][str(parameter)])
        self._set_mode(is_searched=True)
        build_caches(self._parameters)
        self.optimizer.load_state_dict(state["optimizer"])
        if self._best is not None and state["best"]:
            self._best.load_state_dict(state["best"])
        if self._tuned is not None:
            self._tuned.load_state_dict(state["tuned"])
        is_hard = all(parameter.temperature == 0 for parameter in self._parameters)
        if self._statistics is not None and is_hard:
            self._statistics.start(is_resumed=True)
