"""NNI's evaluators as the training loop that a search runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nni.compression.utils import Evaluator, LightningEvaluator, TransformersEvaluator
from torch import Tensor, nn


class EvaluatorLoop:
    """The training loop of a bound evaluator.

    Parameters
    ----------
    evaluator
        NNI's, bound to the model.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.has_trainer = isinstance(evaluator, LightningEvaluator | TransformersEvaluator)

    def join(
        self,
        scores: Iterable[nn.Parameter],
        check_loss: Callable[[Tensor, Any], Tensor],
        after_step: Callable[[], None],
        run: Callable[[Callable[..., None], int | None, int | None], None],
    ) -> None:
        """Make the next training a search.

        Parameters
        ----------
        scores
            Parameters that the evaluator's first optimizer gets as well.
        check_loss
            Called with each loss and its batch.
        after_step
            Called after each step of the first optimizer.
        run
            Called in place of the training, with it and its length in steps and in epochs.
        """
        evaluator = self._evaluator
        # No module has this name, so NNI takes the first optimizer.
        evaluator.patch_optim_param_group({"scores": list(scores)})
        evaluator.patch_loss(check_loss)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[after_step])
        train = evaluator.train

        def search(max_steps: int | None = None, max_epochs: int | None = None) -> None:
            del evaluator.train  # only this call knows the length of the search
            run(train, max_steps, max_epochs)

        evaluator.train = search

    def total_steps(self) -> int | None:
        """Return the optimizer steps that a trainer is about to take, where there is a trainer to ask."""
        evaluator = self._evaluator
        if isinstance(evaluator, TransformersEvaluator):
            return evaluator.trainer.state.max_steps
        if not isinstance(evaluator, LightningEvaluator):
            return None
        module, trainer = evaluator.model, evaluator.model.trainer
        if module.automatic_optimization or trainer.max_steps == -1:
            return int(trainer.estimated_stepping_batches)
        # Lightning counts the steps of all optimizers together; the driver is one that takes its turn.
        of_epochs = trainer.num_training_batches * (trainer.max_epochs or 0)
        of_steps = trainer.max_steps // len(trainer.optimizers)
        return int(min(of_epochs, of_steps)) if of_epochs > 0 else of_steps

    @property
    def training_step(self) -> tuple[Any, str]:
        """Object and attribute of the function that computes the loss of a batch."""
        evaluator = self._evaluator
        if isinstance(evaluator, LightningEvaluator):
            return evaluator.model, "training_step"
        if isinstance(evaluator, TransformersEvaluator):
            return evaluator.trainer, "compute_loss"
        return evaluator, "_training_step"

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Let a LightningModule log nothing in the block; the other evaluators' training steps do not log."""
        if not isinstance(self._evaluator, LightningEvaluator):
            yield
            return
        module = self._evaluator.model
        names = ("log", "log_dict")
        for name in names:
            object.__setattr__(module, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            for name in names:
                object.__delattr__(module, name)

    @property
    def steps_by_hand(self) -> bool:
        """Whether the model itself takes the steps: Lightning's manual optimization."""
        is_lightning = isinstance(self._evaluator, LightningEvaluator)
        return is_lightning and not self._evaluator.model.automatic_optimization
