"""A search inside ``transformers.Trainer``, by a callback. Importing this file imports transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nni_jackpot.errors import CheckpointError, NothingSearchedError
from nni_jackpot.masks import Masks
from nni_jackpot.runtime.files import load_tensors, replace_file, save_tensors
from nni_jackpot.search.own_loop import OwnLoop

_FILE = "jackpot_search.pt"


class _Pruner(Protocol):
    def begin(self, total_steps: int, held_out: Callable[[], Tensor | float] | None = None) -> OwnLoop: ...

    def score_parameters(self) -> list[nn.Parameter]: ...


class JackpotCallback(TrainerCallback):
    """Search a jackpot while ``transformers.Trainer`` trains; not one weight changes.

    The trainer computes losses and gradients, accumulates, clips and unscales them. Where its optimizer would
    step, the search steps, and leaves the optimizer no gradient. The learning rate is that of the search.
    Checkpoints of the trainer have scores and masks in the model's file, and the rest of the search in
    ``jackpot_search.pt``; ``trainer.train(resume_from_checkpoint=...)`` continues from both.

    Parameters
    ----------
    pruner
        The pruner whose model the trainer gets; make it before the trainer trains.
    norm_batches
        Batches to re-estimate batch-norm statistics with at the end (`LotteryJackpotPruner.reestimate_norm`).
    held_out
        Returns the model's loss on a few batches, always the same: the search then ends with the best of the
        masks that it has compared (`LotteryJackpotPruner.begin`).
    resume_folder
        Folder of the checkpoint to resume from, if it is not ``checkpoint-STEP`` in the trainer's output.

    Attributes
    ----------
    masks
        The masks, once the training has ended; None before.

    Examples
    --------
    >>> pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    >>> callback = JackpotCallback(pruner)
    >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    >>> masks = callback.masks
    >>> pruner.unwrap_model()
    """

    def __init__(
        self,
        pruner: _Pruner,
        norm_batches: Any = None,
        held_out: Callable[[], Tensor | float] | None = None,
        resume_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.masks: Masks | None = None
        self._pruner = pruner
        self._norm_batches = norm_batches
        self._held_out = held_out
        self._resume_folder = resume_folder
        self._search: OwnLoop | None = None
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin the search, or continue it if the trainer resumes.

        Parameters
        ----------
        args, state, control, optimizer, **kwargs
            What the trainer passes.

        Raises
        ------
        NothingSearchedError
            If the trainer's optimizer does not hold the scores.
        CheckpointError
            If the trainer resumes from a checkpoint without a search, or with another one.
        """
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if not all(id(score) in held for score in self._pruner.score_parameters()):
            raise NothingSearchedError(
                "the trainer's optimizer does not hold the scores: make the pruner before the trainer "
                "trains, and let the trainer make its optimizer"
            )
        path = self._folder(args, state) / _FILE
        saved = load_tensors(path, "search") if state.global_step else None
        self._search = self._pruner.begin(state.max_steps, self._held_out)
        if saved is not None:
            self._resume(path, saved, state.global_step)
        if self._hook is not None:
            self._hook.remove()
        self._hook = inner.register_step_pre_hook(self._before_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state of the search beside the trainer's checkpoint.

        Parameters
        ----------
        args, state, control, **kwargs
            What the trainer passes.
        """
        folder = _checkpoint_folder(args, state)
        if self._search is not None and args.should_save and folder.is_dir():
            search_state = self._search.state_dict()
            replace_file(folder / _FILE, lambda aside: save_tensors(search_state, aside))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the search.

        Parameters
        ----------
        args, state, control, **kwargs
            What the trainer passes.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._search is not None:
            self.masks = self._search.finish(self._norm_batches)
            self._search = None

    def _before_step(self, driver: Optimizer, args: Any, kwargs: Any) -> None:
        assert self._search is not None
        self._search.step_before(driver)

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return _checkpoint_folder(args, state) if self._resume_folder is None else Path(self._resume_folder)

    def _resume(self, path: Path, saved: Any, step: int) -> None:
        assert self._search is not None
        try:
            if not isinstance(saved, Mapping) or saved["clock"]["step"] > step:
                raise ValueError(f"it is not the state of a search after {step} steps")
            self._search.load_state_dict(saved)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{path} belongs to another search, or is damaged: {error}") from error


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
