"""A search in a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masks import Masks
from nni_jackpot.search.best_masks.held_out import HeldOut
from nni_jackpot.search.driven_search import unscale
from nni_jackpot.search.loop import Search


class OwnLoop:
    """The search that `LotteryJackpotPruner.begin` returns: one `step` per batch, then `finish`.

    Parameters
    ----------
    search
        The search, which has begun.
    masks_of
        Called at the end with the batches for norm statistics; returns the masks.
    held_out
        Loss by which the search chooses among the masks that it has had; None to end with the last ones.
    """

    def __init__(
        self, search: Search, masks_of: Callable[[Any], Masks], held_out: HeldOut | None = None
    ) -> None:
        self._search = search
        self._masks_of = masks_of
        self._held_out = held_out

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; the initial one before the first."""
        return self._search.learning_rate

    @property
    def progress(self) -> float:
        """Progress of the search, in [0, 1]."""
        return self._search.clock.progress()

    def step(self, loss: Tensor | None = None) -> None:
        """Move the scores by their gradients, drop the gradients, and update the masks.

        Parameters
        ----------
        loss
            The loss, if it is to be checked: a NaN then stops the search at once, and the pruner keeps the
            last masks that gave a finite loss.

        Raises
        ------
        SearchDivergedError
            If the loss is NaN or infinite, or a score is NaN.
        NothingSearchedError
            In the first step, if the loss does not depend on the masks of targets that were read.
        """
        try:
            if loss is not None:
                self._search.check_loss(loss)
            self._search.step()
            if self._held_out is not None:
                self._search.compare_if_due(self._held_out.measure)
        except SearchDivergedError as error:
            diverged = self._search.undo(error)
            self._search.close()
            raise diverged from error

    def step_before(self, driver: Optimizer) -> None:
        """Take a step in the place of another optimizer, which holds the scores too and finds no gradient.

        Parameters
        ----------
        driver
            The optimizer that is about to step. Nothing happens where a gradient scaler has found that its
            gradients are not finite.

        Raises
        ------
        SearchDivergedError, NothingSearchedError
            As `step`.
        """
        if unscale(driver, self._search.optimizer):
            self.step()

    def finish(self, norm_batches: Any = None) -> Masks:
        """End the search and return the masks.

        Parameters
        ----------
        norm_batches
            Batches to re-estimate batch-norm statistics with (`LotteryJackpotPruner.reestimate_norm`).

        Raises
        ------
        NothingSearchedError
            If there was no step.
        SearchDivergedError
            If a score is NaN.
        """
        try:
            self._search.finish()
            if self._held_out is not None and self._search.choose(self._held_out.measure):
                self._held_out.reestimate_norm()
        except SearchDivergedError as error:
            raise self._search.undo(error) from error
        finally:
            self._search.close()
        return self._masks_of(norm_batches)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the search needs to continue; scores and statistics are in the model's state dict.

        Take it right after a `step`, together with the model's.
        """
        return self._search.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; load the model's state dict first.

        Raises
        ------
        ValueError, TypeError, LookupError
            If the state belongs to another search; nothing is changed then.
        """
        self._search.check_state(state)
        self._search.load_state_dict(state)
