"""A folder of weights as Hugging Face's libraries write it: ``model.safetensors``, or shards with an index.

The folder may come from anybody. Nothing in it is run or unpickled, names in the index lead to no other
folder, and a tensor is read only when it is asked for, so that memory is bounded by the largest tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nni_jackpot.errors import CheckpointError, TicketError, first_few
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.formats.rules import error_prefix
from nni_jackpot.storage.formats.sealed import digest_of, read_tensor
from nni_jackpot.storage.formats.sealed_format import Entry, header_of, plain

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_INDEX = 64 << 20  # bytes: hundreds of times the largest existing index
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Weights in other formats are not copied: they would still be dense.
_OTHER_WEIGHTS = (*_PICKLED, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot")


class Place(NamedTuple):
    """The file of a tensor, and the tensor's dtype, shape and first byte in the file."""

    file: str
    entry: Entry


class WeightFolder:
    """The tensors of a folder of safetensors, read one by one.

    Parameters
    ----------
    path
        The folder.

    Attributes
    ----------
    path
        The folder.
    places
        Place of every tensor by name.

    Raises
    ------
    CheckpointError
        If the folder has no safetensors, or an index or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.places: dict[str, Place] = {}
        self._digests: dict[str, bytes] = {}
        if not self.path.is_dir():
            raise CheckpointError(f"there is no folder {escaped(self.path)}")
        expected = self._index()
        self.files = sorted(set(expected.values())) if expected else [_WHOLE]
        self._stamps = {file: self._stamp(file) for file in self.files}
        for file in self.files:
            self._add(file, {name for name, of in expected.items() if of == file} if expected else None)

    def form(self, name: str) -> Tensor:
        """Return a tensor without values, on the meta device, of the dtype and shape of the named one."""
        entry = self.places[name].entry
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Read a tensor onto the CPU; raises CheckpointError if its file has changed since it was opened."""
        file, entry = self.places[name]
        self._check_unchanged(file)
        with self._errors(file), self._file(file).open("rb") as stream:
            stream.seek(entry.begin)
            return read_tensor(stream, entry, name)

    def digest(self, name: str) -> bytes:
        """Return the hash of a tensor, computed once (`formats.sealed.digest_of`)."""
        self._check_unchanged(self.places[name].file)
        if name not in self._digests:
            self._digests[name] = digest_of(self.read(name))
        return self._digests[name]

    def other_files(self) -> Iterator[Path]:
        """Iterate over the paths, within the folder, of all files that are not weights, such as the config.

        Hidden files and weights in other formats are left out.

        Raises
        ------
        CheckpointError
            If a link leads out of the folder, except to the blobs of Hugging Face's cache.
        """
        for root, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                inner = (Path(root) / name).relative_to(self.path)
                is_top = inner.parent == Path()
                if name.startswith(".") or name.lower().endswith(_OTHER_WEIGHTS):
                    continue
                if not is_top or not name.endswith(".safetensors"):
                    self._check_inside(str(inner))
                    yield inner

    # -- reading the folder

    def _index(self) -> dict[str, str]:
        """Return the file of every tensor by the index; empty if there is one file without an index."""
        if self._file(_WHOLE).exists():
            return {}
        path = self._file(_INDEX)
        if not path.exists():
            raise CheckpointError(f"{escaped(self.path)} has no {_WHOLE} and no {_INDEX}; {self._remedy()}")
        self._check_inside(_INDEX)
        if (size := path.stat().st_size) > _MOST_INDEX:
            raise CheckpointError(f"{escaped(path)} has {size:,} bytes; an index has at most {_MOST_INDEX:,}")
        with self._errors(_INDEX):
            try:
                index = plain(path.read_text("utf-8"), size)
            except ValueError as error:  # not UTF-8; a TicketError says which rule is broken
                raise error if isinstance(error, TicketError) else TicketError(escaped(error)) from None
        files: Any = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
            raise CheckpointError(f"{escaped(path)} is damaged: weight_map must name a file for every tensor")
        for file in set(files.values()):
            if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{escaped(path)} is damaged: {escaped(file)!r} is not the name of a safetensors file in "
                    "this folder"
                )
        return files

    def _remedy(self) -> str:
        names = sorted(path.name for path in self.path.iterdir())
        for endings, remedy in (
            (
                _PICKLED,
                "pickles can run code; load them by from_pretrained and save by save_pretrained first",
            ),
            (
                (".gguf",),
                "a ticket refers to dequantized weights, and GGUF has others; load them by "
                "from_pretrained(folder, gguf_file=...), then ticket.apply(model)",
            ),
        ):
            if found := [name for name in names if name.lower().endswith(endings)]:
                return f"it has {escaped(first_few(found))}: {remedy}"
        return "save the model by save_pretrained first"

    def _add(self, file: str, expected: set[str] | None) -> None:
        """Add the tensors of a file, which must be those that the index expects in it."""
        path = self._file(file)
        with self._errors(file), path.open("rb") as stream:
            _, entries = header_of(stream, os.fstat(stream.fileno()).st_size)
            begin = stream.tell()
        if expected is not None and (wrong := sorted(expected ^ entries.keys())):
            found = escaped(first_few(wrong))
            raise CheckpointError(f"{escaped(path)} and the index disagree about {found}")
        for name, entry in entries.items():
            self.places[name] = Place(file, replace(entry, begin=begin + entry.begin))

    @contextmanager
    def _errors(self, file: str) -> Iterator[None]:
        try:
            with error_prefix(f"{escaped(self._file(file))} is damaged"):
                yield
        except OSError as error:
            raise CheckpointError(f"{escaped(self._file(file))} is not readable: {escaped(error)}") from None

    def _file(self, name: str) -> Path:
        return self.path / name

    def _check_inside(self, name: str) -> None:
        """Refuse anything but regular files in this folder, or in the blobs of Hugging Face's cache."""
        real, path = self._file(name).resolve(), self._file(name)
        allowed = [self.path.resolve()]
        if self.path.resolve().parent.name == "snapshots":
            allowed.append(self.path.resolve().parents[1] / "blobs")
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise CheckpointError(f"{escaped(path)} is a link out of its folder, to {escaped(real)}")
        if not real.is_file():
            raise CheckpointError(f"{escaped(path)} is missing, or not a regular file")

    def _stamp(self, file: str) -> tuple[int, int, int]:
        self._check_inside(file)
        status = self._file(file).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _check_unchanged(self, file: str) -> None:
        if self._stamp(file) != self._stamps[file]:
            raise CheckpointError(
                f"{escaped(self._file(file))} has changed since it was opened: open it again"
            )
