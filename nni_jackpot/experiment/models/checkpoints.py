"""State dicts in the files of training scripts: checkpoints, safetensors, folders of the Hugging Face hub.

Nothing in a file is run. What is neither a tensor nor plain data, such as the arguments of a script, is
replaced by an object without content.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nni_jackpot.errors import CheckpointError, first_few
from nni_jackpot.runtime.files import load_tensors
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.weight_folder import WeightFolder

# Keys under which training scripts store a state dict; averaged weights come first, as in timm.
_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model")
# What wrappers put before all names, and torch.compile into them.
_PREFIXES = ("module.", "model.")
_COMPILED = "_orig_mod."
# The counter of torch.optim.swa_utils.AveragedModel.
_COUNTER = "n_averaged"

_DEEPEST = 3
_REMEDY = (
    "Where you trust the file, write its weights alone: torch.save(model.state_dict(), 'weights.pth'), with "
    "the model that torch.load(FILE, weights_only=False) gives"
)


class _Unread:
    """An object in the place of one that a file wants to make."""

    def __new__(cls, *_: Any, **__: Any) -> _Unread:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


def read_checkpoint(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Read a state dict onto the CPU.

    Parameters
    ----------
    path
        A file of ``torch.save`` or safetensors, or a folder of safetensors. The state dict may stand in a
        dict of a training script; averaged weights are then preferred.
    names
        Names of the network's tensors. Prefixes of wrappers that the network does not have are removed.

    Raises
    ------
    CheckpointError
        If there is no state dict, or the file has a pickled model, which is not read.
    """
    if path.is_dir():
        folder = WeightFolder(path)
        state = {name: folder.read(name) for name in folder.places}
    elif path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {path}") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a checkpoint: {escaped(error)}") from None
    else:
        state = _state_in(_content(path), path)
        most = path.stat().st_size
        for name, tensor in state.items():
            # Strides of 0 let a few bytes pass for a large tensor.
            if tensor.numel() * tensor.element_size() > most:
                raise CheckpointError(f"{path} has {most:,} bytes, and {escaped(name)} claims to be larger")
    return _by_plain_names(state, set(names)) if names else state


def _content(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds, with all objects that it wants to make unread."""
    try:
        unread = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # missing, damaged, or of another format, which the reader reports
        unread = []
    stand_ins: list[Any] = [(_Unread, name) for name in unread]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return load_tensors(path, "checkpoint")
    except CheckpointError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) or "TorchScript" in str(error):
            raise CheckpointError(f"{error}. {_REMEDY}") from error
        raise


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in the content of a file."""
    keys: list[str] = []
    for _ in range(_DEEPEST):
        if not isinstance(content, dict):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            break
        there = [key for key in _KEYS if isinstance(content.get(key), dict | _Unread)]
        plain = [key for key in there if isinstance(content[key], dict) and content[key]]
        if not there:
            break
        key = (plain or there)[0]
        if len(plain) > 1:
            _tell(str(path), key, ", ".join(plain))
        content = content[key]
        keys.append(key)
    where = f"{path}{''.join(f', {key}' for key in keys)}"
    if isinstance(content, _Unread):
        raise CheckpointError(
            f"{where} is a whole model as a pickle, which can run code, and is not read. {_REMEDY}"
        )
    wrong = _strangers(content)
    if wrong is not None:
        wanted = f"tensors by name are wanted, or a dict with them as one of {', '.join(_KEYS)}"
        raise CheckpointError(f"{where} is not a state dict: {wanted}{wrong}")
    return dict(content)


def _strangers(content: Any) -> str | None:
    """Return in words what makes content no state dict; None if it is one."""
    if not isinstance(content, dict) or not content:
        return ""
    others = [
        name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    return f"; found {first_few([escaped(name) for name in others], separator=', ')}" if others else None


@cache
def _tell(path: str, taken: str, among: str) -> None:
    logging.getLogger(__name__).warning("%s has %s: the weights in %s are used", path, among, taken)


def _by_plain_names(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of wrappers."""
    found = {
        name if name in names else name.replace(_COMPILED, ""): value
        for name, value in state.items()
        if name in names or name != _COUNTER
    }
    for prefix in _prefixes(found, names):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _prefixes(state: Mapping[str, Tensor], names: Collection[str]) -> Iterator[str]:
    """Iterate over the prefixes that all names have, and the network's have not."""
    left = list(state)
    while left and (
        prefix := next(
            (
                prefix
                for prefix in _PREFIXES
                if all(name.startswith(prefix) for name in left)
                and not any(name.startswith(prefix) for name in names)
            ),
            "",
        )
    ):
        yield prefix
        left = [name.removeprefix(prefix) for name in left]


def class_counts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the number of classes of a checkpoint and of a network, if they differ in nothing else."""
    if state.keys() != own.keys():
        return None
    differing = [name for name in own if state[name].shape != own[name].shape]
    pairs = {(tuple(state[name].shape[:1]), tuple(own[name].shape[:1])) for name in differing}
    others = any(state[name].shape[1:] != own[name].shape[1:] for name in differing)
    if others or len(pairs) != 1 or any(len(part) != 1 for pair in pairs for part in pair):
        return None
    ((found,), (wanted,)) = pairs.pop()
    return found, wanted
