"""A search inside a ``pytorch_lightning.Trainer``, by a callback. Importing this file imports Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytorch_lightning
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_jackpot.errors import CheckpointError, NothingSearchedError
from nni_jackpot.masks import Masks
from nni_jackpot.search.own_loop import OwnLoop


class _Pruner(Protocol):
    def begin(self, total_steps: int, held_out: Callable[[], Tensor | float] | None = None) -> OwnLoop: ...

    def score_parameters(self) -> list[nn.Parameter]: ...


class JackpotCallback(pytorch_lightning.Callback):
    """Search a jackpot while ``pytorch_lightning.Trainer`` trains; not one weight changes.

    The trainer computes losses and gradients, and accumulates. Where its optimizer would step, the search
    steps, and leaves the optimizer no gradient. The learning rate is that of the search; gradients are not
    clipped. The trainer's checkpoints have scores and masks with the module's state, and the rest of the
    search with the callback's: ``trainer.fit(module, ckpt_path=...)`` continues from both.

    Parameters
    ----------
    pruner
        The pruner of the module, or of a network in it; make it before the trainer fits.
    norm_batches
        Batches to re-estimate batch-norm statistics with at the end (`LotteryJackpotPruner.reestimate_norm`).
    held_out
        Returns the model's loss on a few batches, always the same: the search then ends with the best of the
        masks that it has compared (`LotteryJackpotPruner.begin`).

    Attributes
    ----------
    masks
        The masks, once the training has ended; None before.

    Examples
    --------
    >>> pruner = LotteryJackpotPruner(module.network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}])
    >>> callback = JackpotCallback(pruner)
    >>> pytorch_lightning.Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
    >>> masks = callback.masks
    >>> pruner.unwrap_model()
    """

    def __init__(
        self,
        pruner: _Pruner,
        norm_batches: Any = None,
        held_out: Callable[[], Tensor | float] | None = None,
    ) -> None:
        self.masks: Masks | None = None
        self._pruner = pruner
        self._norm_batches = norm_batches
        self._held_out = held_out
        self._search: OwnLoop | None = None
        self._saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the search, or continue it if the trainer resumes.

        Parameters
        ----------
        trainer, pl_module
            What Lightning passes.

        Raises
        ------
        NothingSearchedError
            If the module has several optimizers or steps them itself, its optimizer does not hold the scores,
            the training has no end, or its gradients are scaled.
        CheckpointError
            If the trainer resumes from a checkpoint without a search, or with another one.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise NothingSearchedError("JackpotCallback needs automatic optimization by one optimizer")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise NothingSearchedError(
                f"JackpotCallback needs gradients that are not scaled: precision {trainer.precision} scales "
                "them; bf16-mixed does not"
            )
        held = {
            id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]
        }
        if not all(id(score) in held for score in self._pruner.score_parameters()):
            raise NothingSearchedError(
                "the trainer's optimizer does not hold the scores: make the pruner before the trainer fits, "
                "and let configure_optimizers take self.parameters()"
            )
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise NothingSearchedError("a search needs an end: give the trainer max_epochs or max_steps")
        self._search = self._pruner.begin(int(total), self._held_out)
        if trainer.global_step:
            self._resume(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Step the search.

        Parameters
        ----------
        trainer, pl_module, optimizer
            What Lightning passes, when gradients are complete.
        """
        assert self._search is not None
        self._search.step_before(optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the search.

        Parameters
        ----------
        trainer, pl_module
            What Lightning passes.
        """
        if self._search is not None:
            self.masks = self._search.finish(self._norm_batches)
            self._search = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the search, for the trainer's checkpoint."""
        return {} if self._search is None else self._search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the training starts.

        Parameters
        ----------
        state_dict
            What `state_dict` returned.
        """
        self._saved = state_dict

    def _resume(self, step: int) -> None:
        assert self._search is not None
        try:
            if not self._saved or self._saved["clock"]["step"] > step:
                raise ValueError(f"it is not the state of a search after {step} steps")
            self._search.load_state_dict(self._saved)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint has no search, or another one: {error}") from error
