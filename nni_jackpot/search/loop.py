"""One search: the loop of an evaluator trains scores instead of weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nni_jackpot.errors import NothingSearchedError, SearchDivergedError
from nni_jackpot.masking.targets import ScoreGroup, refresh_scored, remake_values
from nni_jackpot.search.checkpoint import Checkpoint
from nni_jackpot.search.clock import SearchClock
from nni_jackpot.search.sparsity_schedule import Growth

_logger = logging.getLogger(__name__)


class TrainingLoop(Protocol):
    """What a search asks of the loop that it runs in."""

    has_trainer: bool
    """Whether a trainer, which knows the length, runs the loop."""

    def join(
        self,
        scores: list[nn.Parameter],
        check_loss: Callable[[Tensor, Any], Tensor],
        after_step: Callable[[], None],
        run: Callable[[Callable[..., None], int | None, int | None], None],
    ) -> None:
        """Have the next training be a search, as ``run`` does it."""

    def total_steps(self) -> int | None:
        """Return the steps that a trainer is about to take, where there is one."""

    @property
    def training_step(self) -> tuple[Any, str]:
        """Where the function that gives the loss of a batch is kept: object and attribute."""

    @property
    def steps_by_hand(self) -> bool:
        """True if no checkpoint can follow the steps."""


class Search:
    """A search by the SGD of Sec. 4.1, or another optimizer, inside the training loop of an evaluator.

    The evaluator's own optimizer, the driver, has the scores as well, for what acts on gradients before its
    step: unscaling under mixed precision, clipping. Right before it would move them the search takes its own
    step, and drops the gradients.

    Parameters
    ----------
    model
        The wrapped model.
    groups
        What is searched.
    optimizer
        Moves the scores; its learning rates are those at the start of the schedule.
    initial_values
        Scores of kept and of pruned grains, for a new start after a divergence.
    schedule
        Factor of the learning rate, and of the swap limit, at a progress in [0, 1].
    swap_limit
        Largest share of kept weights that one step may replace; None for no limit.
    growth
        Sets how many grains are kept in the course of the search.
    follow_goals
        Called after every step; changes budgets where another pruner schedules them.
    checkpoint
        Where the search writes how far it has come, and goes on from; None for nowhere.

    Attributes
    ----------
    clock
        How far the search has come.
    driver
        The evaluator's optimizer, once it has taken a step.
    """

    training: TrainingLoop

    def __init__(
        self,
        model: nn.Module,
        groups: list[ScoreGroup],
        optimizer: Optimizer,
        initial_values: tuple[float, float],
        schedule: Callable[[float], float],
        swap_limit: float | None,
        growth: Growth,
        follow_goals: Callable[[], None],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.clock = SearchClock(None, None)
        self.groups = groups
        self.optimizer = optimizer
        self.driver: Optimizer | None = None
        for param_group in optimizer.param_groups:
            param_group.setdefault("initial_lr", param_group["lr"])
        self._model = model
        self._initial_values = initial_values
        self._schedule = schedule
        self._swap_limit = swap_limit
        self.growth = growth
        self._follow_goals = follow_goals
        self._checkpoint = checkpoint
        self._without_gradient = list(groups)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; the initial one before the first."""
        return self.optimizer.param_groups[0]["lr"]

    def prepare(self, training: TrainingLoop) -> None:
        """Have the next training be the search, whichever compressor asks for it."""
        self.training = training
        scores = [group.score for group in self.groups]
        training.join(scores, self._check_loss, self._after_step, self._search)

    def _search(self, train: Callable[..., None], max_steps: int | None, max_epochs: int | None) -> None:
        hook = register_optimizer_step_pre_hook(self._before_step)
        try:
            self.growth.follow(0.0)
            refresh_scored(self.groups)
            for group in self.groups:
                group.tell(True)
            remake_values(self.groups)
            self._run(train, max_steps, max_epochs)
        finally:
            hook.remove()
            self.growth.finish()
            for group in self.groups:
                group.tell(False)

    def _run(self, train: Callable[..., None], max_steps: int | None, max_epochs: int | None) -> None:
        has_trainer = self.training.has_trainer
        self.clock = SearchClock(None if has_trainer else max_steps, max_epochs)
        if self._checkpoint is not None:
            self._checkpoint.begin(self, self._model, max_steps, max_epochs)
        try:
            if max_steps is not None or has_trainer:
                train(max_steps, max_epochs)
            else:
                for _ in range(max_epochs or 0):
                    self.clock.begin_epoch()
                    train(None, 1)
            if self.clock.step == 0:
                raise NothingSearchedError(
                    "the search took no step: the training loop must call step() of the evaluator's first "
                    "optimizer, which has the scores"
                )
            if self._without_gradient:
                _logger.warning(
                    "%s had no gradient in the whole search: their masks are those of the start",
                    ", ".join(map(str, self._without_gradient)),
                )
            self.growth.finish()
            refresh_scored(self.groups)  # masks that waited would tell only now of a score that is NaN
            if self._checkpoint is not None:
                self._checkpoint.end()
        except SearchDivergedError as error:
            if self._checkpoint is not None:
                self._checkpoint.remove()
            for group in self.groups:
                group.undo(*self._initial_values)
            raise SearchDivergedError(
                f"{error} at step {self.clock.step + 1} of the search; the pruner keeps the last masks "
                "that gave a finite loss. Lower lr, or look at the data of that step"
            ) from error

    @property
    def _replaying(self) -> bool:
        return self._checkpoint is not None and self._checkpoint.replaying

    def _check_loss(self, loss: Tensor, batch: Any) -> Tensor:
        if self._replaying:
            return loss
        if not torch.isfinite(loss).all():
            raise SearchDivergedError(f"the loss became {loss.detach().reshape(-1)[0].item()}")
        for group in self.groups:
            group.accept()
        return loss

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Serve PyTorch's hook of all optimizers, and act on the driver's step: once gradients are there.

        Lightning computes them within the step, in the closure that it hands over.
        """
        if optimizer is self.optimizer or not _holds(optimizer, self.groups[0].score):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._step(optimizer)
            return None

        def closure_and_search() -> Any:
            result = closure()
            self._step(optimizer)
            return result

        return args[:1], {**kwargs, "closure": closure_and_search}

    def _step(self, driver: Optimizer) -> None:
        self.driver = driver
        if self._replaying:
            self.optimizer.zero_grad(set_to_none=True)
            self.clock.step += 1
            return
        if not _unscale(driver, self.optimizer):
            return
        if self.clock.max_steps is None:
            self.clock.max_steps = self.training.total_steps()
        if self._without_gradient:
            self._look_for_gradients()
        factor = self._schedule(self.clock.progress())
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["initial_lr"] * factor
        if self._swap_limit is not None:
            for group in self.groups:
                group.limit_swaps(self._swap_limit * factor)
        self.growth.follow(self.clock.progress())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        refresh_scored(self.groups)
        self.clock.step += 1

    def _look_for_gradients(self) -> None:
        """Find the scores that have no gradient, since the loss does not depend on their masks.

        Raises
        ------
        NothingSearchedError
            In the first step, for a target whose weight was read, or if no score has a gradient. A target
            that no forward has come to yet (an expert, a branch) is legitimate, and a warning tells of it.
        """
        self._without_gradient = [group for group in self._without_gradient if group.score.grad is None]
        if self.clock.step > 0 or not self._without_gradient:
            return
        read = [group for group in self._without_gradient if any(t.relaxed.is_read for t in group.members)]
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

    def _after_step(self) -> None:
        self._follow_goals()
        if self._checkpoint is not None:
            self._checkpoint.after_step()


def _holds(optimizer: Optimizer, score: Tensor) -> bool:
    return any(parameter is score for group in optimizer.param_groups for parameter in group["params"])


def _unscale(driver: Optimizer, search: Optimizer) -> bool:
    """Do what a gradient scaler leaves to a fused optimizer; return whether all gradients are finite."""
    scale, found_inf = getattr(driver, "grad_scale", None), getattr(driver, "found_inf", None)
    if found_inf is not None and found_inf.item():
        search.zero_grad(set_to_none=True)
        return False
    if scale is not None:
        grads = [p.grad for group in search.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, scale.item())
    return True
