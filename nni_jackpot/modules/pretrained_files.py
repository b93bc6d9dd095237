"""Files that ``save_pretrained`` of Hugging Face's libraries writes of a model with computed attributes."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from nni_jackpot.errors import MaskError
from nni_jackpot.modules.attributes import plain_state, source_names

_SAVE = "save_pretrained"


def save_by_plain_names(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` write the weights by the names that ``from_pretrained`` looks for.

    The file then has the dense model, and scores and masks beside it, with which a trainer resumes.
    """
    if callable(getattr(model, _SAVE, None)):
        model.__dict__[_SAVE] = partial(_save, model)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_by_plain_names`."""
    if isinstance(model.__dict__.get(_SAVE), partial):
        del model.__dict__[_SAVE]


def _save(model: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **options: Any) -> Any:
    save = partial(getattr(type(model), _SAVE), model)
    if "state_dict" not in inspect.signature(save).parameters:
        raise MaskError(
            f"{type(model).__name__} cannot be saved while it is wrapped: call unwrap_model() first"
        )
    if state_dict is None:
        held_twice = set(source_names(model))
        state = {**plain_state(model), **model.state_dict()}
        state_dict = {name: value for name, value in state.items() if name not in held_twice}
    return save(*args, state_dict=state_dict, **options)
