"""What work that was interrupted needs to go on as if nothing had been."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import CheckpointError


def random_states() -> dict[str, Any]:
    """Return the states of all global generators, as plain data that can be compared and saved."""
    _, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (keys.tobytes(), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put all global generators where they were.

    Raises
    ------
    CheckpointError
        If there are more or fewer GPUs now.
    """
    were, are = len(states.get("cuda", ())), torch.cuda.device_count()
    if were not in (0, are):
        raise CheckpointError(
            f"the checkpoint has random states of {were} GPUs, and {are} are visible: go on with as many"
        )
    torch.set_rng_state(_bytes(states["torch"]))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.frombuffer(keys, dtype=np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a number of 128 bits, in hexadecimal digits, that no other values are likely to have."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def refuse_other(path: Path, work: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointError, with what differs, for a file of work that depends on other things than ours."""
    differing = [
        f"{name} {_difference(theirs.get(name), own.get(name))}"
        for name in sorted({*theirs, *own})
        if theirs.get(name) != own.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} is the checkpoint of another {work}: {'; '.join(differing)}. Remove it to start anew"
        )


def _difference(was: Any, now: Any) -> str:
    text = f"was {was!r} and is {now!r}"
    return text if len(text) < 100 else "differ"


def _bytes(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
