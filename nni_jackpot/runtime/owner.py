"""One owner for a folder: who holds its lock writes there, and nobody else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from nni_jackpot.errors import OutputFolderError

LOCK = ".lock"
# FileLock empties its file, also where it does not get the lock: the owner's number needs a file of its own.
_OWNER = ".lock.pid"

# The system takes the lock from a process that dies, but its loader's workers share it for some seconds.
_SECONDS_TO_DIE = 15


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder, which is there, for the block; nobody else's block on it runs meanwhile.

    Raises
    ------
    OutputFolderError
        If another process owns it, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while not _acquired(lock, folder):
        owner = _owner(folder)
        if time.monotonic() > deadline or (owner.isdecimal() and psutil.pid_exists(int(owner))):
            raise OutputFolderError(
                f"{folder} is in use by process {owner or 'of an unknown number'}: wait until it ends, or "
                "choose another output"
            )
        time.sleep(0.05)
    try:
        _write_owner(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _acquired(lock: FileLock, folder: Path) -> bool:
    if (folder / LOCK).is_symlink():  # which FileLock would follow, and empty what it leads to
        raise OutputFolderError(f"cannot lock {folder}: {folder / LOCK} is a link, allowed: none")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputFolderError(f"cannot lock {folder}: {reason}") from error
    return True


def _write_owner(folder: Path) -> None:
    path = folder / _OWNER
    try:
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except OSError as error:
        raise OutputFolderError(f"cannot write to {folder}: {error.strerror}") from error


def _owner(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return (folder / _OWNER).read_text(encoding="utf-8").strip()
    return ""
