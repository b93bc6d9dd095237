"""State files and random states, so that interrupted work resumes with the same result."""

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

from nni_jackpot.errors import CheckpointError, first_line
from nni_jackpot.runtime.distributed import rank, world_size
from nni_jackpot.runtime.files import load_tensors, replace_file, save_tensors
from nni_jackpot.runtime.plain import as_plain
from nni_jackpot.runtime.tensor_bytes import as_bytes, from_bytes

# Version of the files that `write_state` writes.
FORMAT = 3


def random_states() -> dict[str, Any]:
    """Return the states of all global random generators, as plain data that can be compared and saved."""
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
    """Restore the states of all global random generators.

    Raises
    ------
    CheckpointError
        If the number of GPUs has changed.
    """
    were, are = len(states.get("cuda", ())), torch.cuda.device_count()
    if were not in (0, are):
        raise CheckpointError(
            f"the checkpoint has random states of {were} GPUs, and {are} are visible: resume with {were}"
        )
    torch.set_rng_state(from_bytes(states["torch"]))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.frombuffer(keys, dtype=np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all([from_bytes(state) for state in states["cuda"]])


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn the errors that damaged content causes in the reading code into a CheckpointError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


@contextmanager
def same_random_states() -> Iterator[None]:
    """Restore all random states after the block, including GPUs first used inside it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a 128-bit hash of the values of tensors, in hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(as_bytes(tensor).numpy().data)
    return found.hexdigest()


def write_state(path: Path, depends_on: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of some work on rank 0, together with the named values that the work depends on."""
    if rank() == 0:
        content = {
            "format": FORMAT,
            "depends on": _with_processes(depends_on),
            **as_plain(state, "the state"),
        }
        replace_file(path, lambda temporary: save_tensors(content, temporary))


def read_state(path: Path, work: str, depends_on: Mapping[str, Any]) -> dict[str, Any]:
    """Read a file of `write_state`, on any rank.

    Parameters
    ----------
    path
        The file.
    work
        Kind of the work, for messages: ``"search"``.
    depends_on
        Named values that the current work depends on; the file must have the same.

    Raises
    ------
    CheckpointError
        If the file is damaged, or its work depends on other values; the message lists the differences.
    """
    saved = _load(path, work)
    _compare(path, work, saved["depends on"], _with_processes(depends_on))
    return saved


def check_state(path: Path, work: str, known: Mapping[str, Any]) -> None:
    """Check a file, if it exists, against the dependencies that are known so far.

    Parameters
    ----------
    path, work
        As for `read_state`.
    known
        A subset of the named values that the current work will depend on.

    Raises
    ------
    CheckpointError
        As `read_state`.
    """
    if path.exists():
        own, saved = _with_processes(known), _load(path, work)["depends on"]
        # All settings (dotted names) are known here; the other dependencies may still be missing.
        theirs = {name: value for name, value in saved.items() if name in own or "." in name}
        _compare(path, work, theirs, own)


def remove_files(*paths: Path) -> None:
    """Remove existing files, on rank 0."""
    if rank() == 0:
        for path in paths:
            path.unlink(missing_ok=True)


def _load(path: Path, work: str) -> dict[str, Any]:
    saved = load_tensors(path, f"checkpoint of a {work}")
    if not isinstance(saved, dict) or not isinstance(saved.get("depends on"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a {work}")
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of format {saved.get('format')!r}, this version reads {FORMAT}: resume "
            "with the version that wrote it, or remove it to start over"
        )
    return saved


def _compare(path: Path, work: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if found := differences(theirs, own):
        raise CheckpointError(f"{path} is the checkpoint of another {work}: {found}. Remove it to start over")


def differences(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Describe the values that differ, by name; empty if none differs."""
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
