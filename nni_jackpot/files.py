"""Files that are whole or not there, and files that run no code when read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nni_jackpot.errors import CheckpointError, OutputFolderError


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file aside, in the same folder, and rename it to ``path``.

    The folder is created if need be. A file that was there stays as it was until the new one is whole.

    Raises
    ------
    OutputFolderError
        If the folder cannot be created or written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for what the system refuses
        raise OutputFolderError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | os.PathLike[str], kind: str) -> Any:
    """Load what ``torch.save`` wrote, onto the CPU, as plain data.

    Parameters
    ----------
    path
        The file.
    kind
        What it should be, for the message: ``"checkpoint"``.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or holds more than tensors and plain containers.
    """
    try:
        # NNI's pruners return defaultdicts, and users save what they return.
        with torch.serialization.safe_globals([(_plain_dict, "collections.defaultdict"), dict]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {kind} {path}") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a {kind}: {reason}") from error


def _plain_dict(default_factory: type) -> dict:
    """Stand in for ``defaultdict``, which the safe unpickler cannot fill."""
    return {}
