"""Files that are whole or not there, and files that run no code when read."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nni_jackpot.errors import CheckpointError, OutputFolderError

# -- writing


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file aside, in the same folder, and rename it to ``path``.

    The folder is created if need be. A file that was there stays as it was until the new one is whole, and
    hands its mode on to it; a link stays, and the file that it leads to is replaced.

    Raises
    ------
    OutputFolderError
        If the folder cannot be created or written, or something that is no regular file is there. What was
        there is then unchanged, and nothing new is left.
    """
    replace_files({Path(path): write})


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Have several files made aside, and renamed when all of them are whole.

    Raises
    ------
    OutputFolderError
        As `replace_file` does. Nothing is made if one of the places will not do.
    """
    targets = {path: target_of(path) for path in writers}
    asides: dict[Path, Path] = {}
    with made_folders(*(target.parent for target in targets.values())):
        try:
            for path, write in writers.items():
                with errors_of(path):
                    asides[path] = _make_aside(targets[path])
                    write(asides[path])
                    _settle(asides[path], targets[path])
            for path, aside in asides.items():
                with errors_of(path):
                    os.replace(aside, targets[path])
                    sync_folder(targets[path].parent)
        finally:
            for aside in asides.values():
                with suppress(OSError):
                    aside.unlink(missing_ok=True)


def save_tensors(content: object, path: Path) -> None:
    """Have PyTorch save tensors and plain data to a file; equal content gives equal bytes.

    Not by the file's name: PyTorch would write that into the file, and a full disk would be "unexpected pos".
    """
    with path.open("wb") as file:
        torch.save(content, file)


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return the file that a path stands for, with all links followed; it need not be there.

    Raises
    ------
    OutputFolderError
        If something is there that is no regular file: a folder, a device, a pipe, a link to itself.
    """
    target = Path(os.path.realpath(path))
    with errors_of(path):
        try:
            mode = target.lstat().st_mode
        except FileNotFoundError:
            return target
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputFolderError(f"cannot write {path}: {target} is {found}, allowed: a file, or nothing yet")
    return target


def check_folder(folder: str | os.PathLike[str]) -> None:
    """See that files could be written to a folder, which need not be there yet; nothing is changed.

    Raises
    ------
    OutputFolderError
        If they could not, as far as can be told without trying.
    """
    place = Path(folder)
    with errors_of(place):
        there = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OutputFolderError(f"cannot write to {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputFolderError(f"cannot write to {folder}: {there} cannot be written")


@contextmanager
def made_folders(*folders: Path) -> Iterator[None]:
    """Make folders; those that were not there go again, as far as they are empty, if the block fails.

    Raises
    ------
    OutputFolderError
        If one cannot be made.
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
    """Remove what killed processes have left beside files, or in folders; for who alone writes there."""
    for path in paths:
        place = Path(os.path.realpath(path))
        stem = "." if place.is_dir() else glob.escape(_stem(place))
        for aside in (place if place.is_dir() else place.parent).glob(f"{stem}*.part"):
            aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names of files in a folder to the disk, where a folder can be opened: not on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make what the system refuses an OutputFolderError about a path, and not about the file made aside."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for what the system refuses
        causes = [cause for cause in (error, error.__context__) if isinstance(cause, OSError)]
        reason = (causes and causes[0].strerror) or str(error).partition("\n")[0]
        raise OutputFolderError(f"cannot write {path}: {reason}") from error


def _stem(target: Path) -> str:
    return f".{target.name[:50]}."  # a name has up to 255 bytes, and a character up to 4


def _make_aside(target: Path) -> Path:
    """Make an empty file that nobody else can have made, by a link least of all."""
    aside = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.part")
    aside.touch(exist_ok=False)  # by O_EXCL, with the mode that the umask leaves
    return aside


def _settle(aside: Path, target: Path) -> None:
    """Bring a file to the disk, with the mode of the one that it will replace."""
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        aside.chmod(stat.S_IMODE(target.stat().st_mode))


# -- reading


def digest_of_file(path: Path) -> str:
    """Return SHA-256 of a file in hexadecimal digits; empty if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()


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
    except pickle.UnpicklingError as error:  # whose words are PyTorch's advice to trust the file
        reason = "it is damaged, or holds more than tensors and plain data"
        raise CheckpointError(f"{path} is not a {kind}: {reason}") from error
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a {kind}: {reason}") from error


def _plain_dict(default_factory: type) -> dict:
    """Stand in for ``defaultdict``, which the safe unpickler cannot fill."""
    return {}
