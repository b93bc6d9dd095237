"""What work that was interrupted needs to go on as if nothing had been."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import CheckpointError
from nni_jackpot.runtime.distributed import rank, world_size
from nni_jackpot.runtime.files import load_tensors, replace_file, save_tensors
from nni_jackpot.runtime.plain import as_plain
from nni_jackpot.runtime.tensor_bytes import as_bytes, from_bytes

# Of what `write_state` writes; another number for another form.
FORMAT = 2


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
    torch.set_rng_state(from_bytes(states["torch"]))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.frombuffer(keys, dtype=np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all([from_bytes(state) for state in states["cuda"]])


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise CheckpointError for what a damaged file makes of the code that takes its content."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged: {reason}") from error


@contextmanager
def same_random_states() -> Iterator[None]:
    """Leave with the random states that there were, also on GPUs that are used for the first time within."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a number of 128 bits, in hexadecimal digits, that no other values are likely to have."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(as_bytes(tensor).numpy().data)
    return found.hexdigest()


def write_state(path: Path, depends_on: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Have rank 0 write where work stands, beside all that the work depends on, by name."""
    if rank() == 0:
        content = {
            "format": FORMAT,
            "depends on": _with_processes(depends_on),
            **as_plain(state, "the state"),
        }
        replace_file(path, lambda aside: save_tensors(content, aside))


def read_state(path: Path, work: str, depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `write_state` wrote, to any rank.

    Parameters
    ----------
    path
        The file.
    work
        What it should be of, for messages: ``"search"``.
    depends_on
        What ours depends on.

    Raises
    ------
    CheckpointError
        If the file is damaged, or of work that depends on other things; the message has what differs.
    """
    saved = _load(path, work)
    _compare(path, work, saved["depends on"], _with_processes(depends_on))
    return saved


def check_state(path: Path, work: str, known: Mapping[str, Any]) -> None:
    """See that a file, if there is one, is of work that depends on what is known of ours so far.

    Parameters
    ----------
    path, work
        As for `read_state`.
    known
        Some of the things that our work will depend on.

    Raises
    ------
    CheckpointError
        As `read_state` does.
    """
    if path.exists():
        own, saved = _with_processes(known), _load(path, work)["depends on"]
        # Settings have dotted names, and all of ours are known.
        theirs = {name: value for name, value in saved.items() if name in own or "." in name}
        _compare(path, work, theirs, own)


def remove_files(*paths: Path) -> None:
    """Have rank 0 remove files, if they are there."""
    if rank() == 0:
        for path in paths:
            path.unlink(missing_ok=True)


def _load(path: Path, work: str) -> dict[str, Any]:
    saved = load_tensors(path, f"checkpoint of a {work}")
    if not isinstance(saved, dict) or not isinstance(saved.get("depends on"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a {work}")
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {saved.get('format')!r}, this version reads {FORMAT}: go on "
            "with the version that wrote it, or remove it to start anew"
        )
    return saved


def _compare(path: Path, work: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if found := differences(theirs, own):
        raise CheckpointError(f"{path} is the checkpoint of another {work}: {found}. Remove it to start anew")


def differences(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say which values differ, by name; empty if none does."""
    return "; ".join(
        f"{name} {_difference(theirs.get(name), own.get(name))}"
        for name in sorted({*theirs, *own})
        if theirs.get(name) != own.get(name)
    )


def _with_processes(depends_on: Mapping[str, Any]) -> dict[str, Any]:
    return as_plain({**depends_on, "the number of processes": world_size()}, "the settings")


def _difference(was: Any, now: Any) -> str:
    text = f"was {was!r} and is {now!r}"
    return text if len(text) < 100 else "differ"
