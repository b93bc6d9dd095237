"""A search inside a training loop that other code runs, such as NNI's evaluators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.search.best_masks.held_out import FirstSteps, HeldOut
from nni_jackpot.search.checkpoint import Checkpoint
from nni_jackpot.search.loop import Search

_logger = logging.getLogger(__name__)


class TrainingLoop(Protocol):
    """What a search asks of the training loop that it runs in."""

    has_trainer: bool
    """Whether a trainer, which knows the length, runs the loop."""

    def join(
        self,
        scores: list[nn.Parameter],
        check_loss: Callable[[Tensor, Any], Tensor],
        after_step: Callable[[], None],
        run: Callable[[Callable[..., None], int | None, int | None], None],
    ) -> None:
        """Make the next training a search, run by ``run``."""

    def total_steps(self) -> int | None:
        """Return the number of steps that a trainer is about to take, if there is a trainer."""

    @property
    def training_step(self) -> tuple[Any, str]:
        """Where the function that computes the loss of a batch is stored: object and attribute."""

    @property
    def steps_by_hand(self) -> bool:
        """Whether the model itself calls the optimizers, so that no checkpoint can follow the steps."""

    def silenced(self) -> AbstractContextManager[None]:
        """Return a context in which the training step logs nothing."""


class DrivenSearch:
    """A search whose steps are taken by another optimizer's: the driver.

    The driver holds the scores as well, so that whatever acts on gradients before its step acts on theirs:
    unscaling under mixed precision, clipping. Right before the driver would move the scores, the search takes
    its own step and drops the gradients.

    Parameters
    ----------
    search
        The search.
    training
        The training loop.
    model
        The wrapped model.
    follow_goals
        Called after every step; changes budgets if another pruner schedules them.
    checkpoint
        Where the search is saved, and resumed from; None for nowhere.
    held_out
        The loss by which the search chooses among the masks that it has had, or the number of training steps
        whose loss that is; 0 to end with the last masks.
    adapts_norm
        Whether norm statistics follow the masks.

    Attributes
    ----------
    driver
        The driver, once it has taken a step.
    """

    def __init__(
        self,
        search: Search,
        training: TrainingLoop,
        model: nn.Module,
        follow_goals: Callable[[], None],
        checkpoint: Checkpoint | None,
        held_out: int | HeldOut = 0,
        adapts_norm: bool = True,
    ) -> None:
        self.search = search
        self._held_out = held_out if isinstance(held_out, HeldOut) else None
        self._steps_held_out = held_out if isinstance(held_out, int) else 0
        self._adapts_norm = adapts_norm
        self._is_measuring = False
        self.driver: Optimizer | None = None
        self._training = training
        self._model = model
        self._follow_goals = follow_goals
        self._checkpoint = checkpoint

    def prepare(self) -> None:
        """Make the next training the search, whichever compressor starts it."""
        scores = [group.score for group in self.search.groups]
        self._training.join(scores, self._check_loss, self._after_step, self._run)

    def _run(self, train: Callable[..., None], max_steps: int | None, max_epochs: int | None) -> None:
        search, has_trainer = self.search, self._training.has_trainer
        hook = register_optimizer_step_pre_hook(self._before_step)
        try:
            search.begin(None if has_trainer else max_steps, max_epochs)
            place = self._training.training_step
            measured_step = getattr(*place)
            if self._checkpoint is not None:
                self._checkpoint.begin(search, self._training, self._model, max_steps, max_epochs)
            self._hold_out(*place, measured_step)
            if max_steps is not None or has_trainer:
                train(max_steps, max_epochs)
            else:
                for _ in range(max_epochs or 0):
                    search.clock.begin_epoch()
                    train(None, 1)
            search.finish()
            self._choose()
            if self._checkpoint is not None:
                self._checkpoint.end()
        except SearchDivergedError as error:
            if self._checkpoint is not None:
                self._checkpoint.remove()
            raise search.undo(error) from error
        finally:
            hook.remove()
            search.close()

    def _hold_out(self, owner: Any, name: str, measured_step: Callable[..., Any]) -> None:
        """Record the first training steps, and compare masks by them before later ones.

        Parameters
        ----------
        owner, name
            Object and attribute of the training step that the loop calls.
        measured_step
            The training step that is computed again, which counts for no checkpoint.
        """
        count = 0 if self._training.steps_by_hand else self._steps_held_out
        steps = FirstSteps(count, measured_step, self._training.silenced)
        if count:
            self._held_out = HeldOut(self._model, self._adapts_norm, steps.loss)
        elif self._held_out is None:
            return
        training_step = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not steps.are_complete:
                steps.record(args, kwargs)
            elif not self._replaying:
                self._measured(lambda held_out: self.search.compare_if_due(held_out.measure))
            return training_step(*args, **kwargs)

        setattr(owner, name, watched)

    def _choose(self) -> None:
        def choose(held_out: HeldOut) -> None:
            if self.search.choose(held_out.measure):
                held_out.reestimate_norm()

        self._measured(choose)

    def _measured(self, work: Callable[[HeldOut], None]) -> None:
        """Do what measures losses; a training step that cannot be computed again does not end the search."""
        if self._held_out is None:
            return
        self._is_measuring = True
        try:
            work(self._held_out)
        except Exception as error:  # the user's code may raise any error
            self._held_out = None
            _logger.warning(
                "the search cannot compare its masks with those of the start: a training step cannot be "
                "computed again without gradients: %s: %s",
                *(type(error).__name__, error),
            )
        finally:
            self._is_measuring = False

    @property
    def _replaying(self) -> bool:
        return self._checkpoint is not None and self._checkpoint.replaying

    def _check_loss(self, loss: Tensor, batch: Any) -> Tensor:
        if not (self._replaying or self._is_measuring):
            self.search.check_loss(loss)
        return loss

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the search's step before the driver's; PyTorch calls this hook for all optimizers.

        Lightning computes gradients within the step, in the closure that it passes: the search's step then
        follows the closure.
        """
        if optimizer is self.search.optimizer or not _holds(optimizer, self.search.groups[0].score):
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
        search = self.search
        if self._replaying:
            search.optimizer.zero_grad(set_to_none=True)
            search.clock.step += 1
            return
        if not unscale(driver, search.optimizer):
            return
        if search.clock.max_steps is None:
            search.clock.max_steps = self._training.total_steps()
        search.step()

    def _after_step(self) -> None:
        self._follow_goals()
        if self._checkpoint is not None and self.driver is not None:
            self._checkpoint.after_step(self.driver)


def _holds(optimizer: Optimizer, score: Tensor) -> bool:
    return any(parameter is score for group in optimizer.param_groups for parameter in group["params"])


def unscale(driver: Optimizer, search: Optimizer) -> bool:
    """Do what a gradient scaler leaves to a fused optimizer; return whether all gradients are finite."""
    scale, found_inf = getattr(driver, "grad_scale", None), getattr(driver, "found_inf", None)
    if found_inf is not None and found_inf.item():
        search.zero_grad(set_to_none=True)
        return False
    if scale is not None:
        grads = [p.grad for group in search.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, scale.item())
    return True
