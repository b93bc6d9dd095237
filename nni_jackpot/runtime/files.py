"""Atomic writes, and reads that execute no code from the file."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nni_jackpot.errors import CheckpointError, OutputFolderError, first_line

# -- writing


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` create a temporary file in the folder of ``path``, then rename it to ``path``.

    A missing folder is created. An existing file is unchanged until the new one is complete, and passes its
    mode on. If ``path`` is a link, the link stays and its target is replaced.

    Raises
    ------
    OutputFolderError
        If the folder cannot be created or written, or ``path`` exists and is not a regular file. Existing
        files are then unchanged, and no new file is left.
    """
    replace_files({Path(path): write})


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write several temporary files, and rename them once all are complete.

    Raises
    ------
    OutputFolderError
        As `replace_file`. Nothing is written if one of the paths is invalid.
    """
    targets = {path: target_of(path) for path in writers}
    temporaries: dict[Path, Path] = {}
    with made_folders(*(target.parent for target in targets.values())):
        try:
            for path, write in writers.items():
                with errors_of(path):
                    temporaries[path] = _create_temporary(targets[path])
                    write(temporaries[path])
                    _flush(temporaries[path], targets[path])
            for path, temporary in temporaries.items():
                with errors_of(path):
                    os.replace(temporary, targets[path])
                    sync_folder(targets[path].parent)
        finally:
            for temporary in temporaries.values():
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


def create_folder(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, then rename it to ``path``.

    Raises
    ------
    OutputFolderError
        If something other than an empty folder exists at ``path``, or the folder cannot be written. Nothing
        is left then.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise OutputFolderError(
            f"cannot write {path}: it exists already; allowed: an empty folder, or nothing"
        )
    with made_folders(target.parent), errors_of(path):
        temporary = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.part")
        temporary.mkdir()
        try:
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file, file)
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(content: object, path: Path) -> None:
    """Save tensors and plain data with ``torch.save``; equal content gives equal bytes.

    PyTorch gets a file object: given a name, it would store the name in the file, and report a full disk as
    "unexpected pos".
    """
    with path.open("wb") as file:
        torch.save(content, file)


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return the file that a path leads to, with all links followed; the file need not exist.

    Raises
    ------
    OutputFolderError
        If the path exists and is not a regular file: a folder, a device, a pipe, a link to itself.
    """
    target = Path(os.path.realpath(path))
    with errors_of(path):
        try:
            mode = target.lstat().st_mode
        except FileNotFoundError:
            return target
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise OutputFolderError(f"cannot write {path}: {target} is {found}, allowed: a file, or nothing yet")
    return target


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Check that files can be written to a folder, which need not exist yet; nothing is changed.

    Raises
    ------
    OutputFolderError
        If permissions or an existing file prevent it. Other causes are found only on writing.
    """
    place = Path(folder)
    with errors_of(place):
        existing = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise OutputFolderError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputFolderError(f"cannot write to {folder}: {existing} cannot be written")


@contextmanager
def made_folders(*folders: Path) -> Iterator[None]:
    """Create missing folders; if the block fails, remove the new ones that are empty.

    Raises
    ------
    OutputFolderError
        If a folder cannot be created.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
            for new in reversed(missing):
                with errors_of(folder):
                    new.mkdir(exist_ok=True)
                made.append(new)
        yield
    except BaseException:
        for new in reversed(made):
            with suppress(OSError):
                new.rmdir()
        raise


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files of killed processes, next to files or in folders.

    The caller must be the only process that writes there.
    """
    for path in paths:
        place = Path(os.path.realpath(path))
        stem = "." if place.is_dir() else glob.escape(_stem(place))
        for temporary in (place if place.is_dir() else place.parent).glob(f"{stem}*.part"):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk; Windows cannot open folders and is skipped."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn system errors into an OutputFolderError that names ``path`` and not the temporary file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports system errors as RuntimeError
        causes = [cause for cause in (error, error.__context__) if isinstance(cause, OSError)]
        reason = (causes and causes[0].strerror) or str(error).partition("\n")[0]
        raise OutputFolderError(f"cannot write {path}: {reason}") from error


def _stem(target: Path) -> str:
    return f".{target.name[:50]}."  # a name has up to 255 bytes, and a character up to 4


def _create_temporary(target: Path) -> Path:
    """Create a new empty file next to ``target``; an existing file or link is never opened."""
    temporary = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.part")
    temporary.touch(exist_ok=False)  # O_EXCL; the umask determines the mode
    return temporary


def _flush(temporary: Path, target: Path) -> None:
    """Flush a file to disk, and give it the mode of the file that it will replace."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))


# -- reading


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; empty if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()


def load_tensors(path: str | os.PathLike[str], kind: str) -> Any:
    """Load a file written by ``torch.save`` onto the CPU, as tensors and plain data.

    Parameters
    ----------
    path
        The file.
    kind
        The expected kind of file, for messages: ``"checkpoint"``.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or contains more than tensors and plain containers.
    """
    # NNI's pruners return defaultdicts, which the safe unpickler cannot fill: read them as dicts.
    allowed: list[Any] = [(lambda factory=None: {}, "collections.defaultdict"), dict]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {kind} {path}") from None
    except pickle.UnpicklingError as error:  # PyTorch's message advises to trust the file
        reason = "it is damaged, or holds more than tensors and plain data"
        raise CheckpointError(f"{path} is not a {kind}: {reason}") from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a {kind}: {first_line(error)}") from error


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Load a state dict onto the CPU.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or contains something other than tensors by name.
    """
    state = load_tensors(path, "checkpoint")
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} is not a state dict: tensors by name are wanted")
    return state
