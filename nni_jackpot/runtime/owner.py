"""Exclusive ownership of a folder: only the process that holds the lock writes there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from nni_jackpot.errors import OutputFolderError
from nni_jackpot.runtime.files import errors_of

LOCK = ".lock"
# FileLock truncates its file even if it fails to get the lock, so the owner's process id has a separate file.
_OWNER = ".lock.pid"

# A process that dies releases the lock, but the workers of its data loader may hold it for some seconds.
_SECONDS_TO_DIE = 15


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Lock an existing folder for the block; no other process can enter such a block on it.

    Raises
    ------
    OutputFolderError
        If another process owns the folder, or it cannot be written.
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
    if (folder / LOCK).is_symlink():  # FileLock would follow the link and truncate its target
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
    with errors_of(path):
        path.unlink(missing_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))


def _owner(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return (folder / _OWNER).read_text(encoding="utf-8").strip()
    return ""
