"""Sealed files: safetensors with a kind, a version, plain data and a digest of it all; whole or refused.

The digest finds damage, not malice: whoever writes a file can seal it. What is read is therefore data and
nothing else, and must be checked by those who know what it means. The library writes these files and does not
read them: it takes a header of any size and form, and several times its bytes of memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from nni_jackpot.errors import TicketError
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.runtime.tensor_bytes import as_bytes
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.formats.rules import saying
from nni_jackpot.storage.formats.sealed_format import (
    BOOLEANS,
    BYTES,
    DIGEST,
    TILING,
    TYPES,
    Entry,
    check_envelope,
    envelope_of,
    header_of,
    is_newer,
    object_of,
)

T = TypeVar("T")

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}


def name_of(dtype: torch.dtype) -> str:
    """Return what a type is called in files, ``float32``."""
    return str(dtype).removeprefix("torch.")


def digest_of(tensor: Tensor) -> bytes:
    """Return SHA-256 (32 bytes) of type, shape and values: ``float32 [64, 3, 7, 7] `` and then the bytes."""
    digest = hashlib.sha256(f"{name_of(tensor.dtype)} {list(tensor.shape)} ".encode())
    digest.update(as_bytes(tensor).numpy().data)
    return digest.digest()


def _digest_of_bytes(part: bytes) -> bytes:
    """Return `digest_of` the tensor of these bytes."""
    digest = hashlib.sha256(f"uint8 [{len(part)}] ".encode())
    digest.update(part)
    return digest.digest()


def write_sealed(
    path: str | os.PathLike[str], kind: str, version: int, content: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Write a sealed file.

    Parameters
    ----------
    path
        Where to; the folder is made if need be.
    kind, version
        What reads it, and which form of it this is.
    content
        Plain data, as JSON has them.
    tensors
        By name; no two of them in the same memory.

    Raises
    ------
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    TicketError
        If a tensor is of a type that safetensors does not know, or no reader would take the file, because its
        content is too large, too deep or ambiguous.
    TypeError, ValueError, RecursionError
        If the content is not plain.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES.values():
            raise TicketError(f"no {kind} can hold {escaped(name)}, of type {name_of(tensor.dtype)}")
    text = json.dumps(content, allow_nan=False)
    content = json.loads(text, object_pairs_hook=object_of)  # as it will be read
    envelope = {"version": version, "content": content, "sha256": seal_of(kind, version, content, tensors)}
    # One entry: the library writes several in an order that changes from one process to the next.
    metadata = {kind: json.dumps(envelope, separators=(",", ":"))}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = save(whole, metadata)
    with saying(f"{path} would be no {kind} that can be read"):
        header_of(io.BytesIO(raw), len(raw))
        envelope_of(metadata, kind, len(raw))
    # Not the library's save_file, whose files are their owner's to read alone, whatever the umask.
    replace_file(path, lambda aside: aside.write_bytes(raw))


def read_sealed(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Any, dict[str, Tensor]]:
    """Read a sealed file: its plain data and its tensors, in memory of their own.

    Raises
    ------
    TicketError
        If it is missing or damaged, of another kind, or of a newer version than this one.
    """
    return _read(path, kind, version, _tensor, digest_of)


def read_parts(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Any, dict[str, bytes]]:
    """Read a sealed file whose tensors are bytes: its plain data, and these bytes.

    Raises
    ------
    TicketError
        If it is missing or damaged, of another kind, or of a newer version than this one.
    """
    return _read(path, kind, version, _part, _digest_of_bytes)


def _read(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    take: Callable[[BufferedReader, Entry, str], T],
    digest: Callable[[T], bytes],
) -> tuple[Any, dict[str, T]]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe is to wait
            raise TicketError(f"{path} is no {kind}, and no regular file")
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with saying(f"{path} is no {kind}, or a damaged one"):
                metadata, entries = header_of(file, size)
            if kind not in metadata:
                found = escaped(" and ".join(metadata)) or "another safetensors file"
                raise TicketError(f"{path} is no {kind}, but {found}")
            with saying(f"{path} is damaged"):
                envelope = envelope_of(metadata, kind, size)
            if is_newer(envelope, version):
                raise TicketError(
                    f"{path} is a {kind} of version {envelope['version']}, and this nni_jackpot reads up to "
                    f"{version}: take a newer nni_jackpot"
                )
            with saying(f"{path} is damaged"):
                return _sealed_in(file, entries, kind, envelope, take, digest)
    except TicketError:
        raise
    except FileNotFoundError:
        raise TicketError(f"there is no {kind} {path}") from None
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise TicketError(f"{escaped(path)} is no {kind} that can be read: {escaped(error)}") from None


def _sealed_in(
    file: BufferedReader,
    entries: Mapping[str, Entry],
    kind: str,
    envelope: Any,
    take: Callable[[BufferedReader, Entry, str], T],
    digest: Callable[[T], bytes],
) -> tuple[Any, dict[str, T]]:
    """Return the plain data and the tensors, where ``file`` is at the first of them."""
    check_envelope(envelope)
    begin, tensors = file.tell(), {}
    for name, entry in entries.items():
        file.seek(begin + entry.begin)
        tensors[name] = take(file, entry, name)
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    if envelope["sha256"] != _seal(kind, envelope["version"], envelope["content"], digests):
        raise DIGEST.broken("its digest")
    return envelope["content"], tensors


def _tensor(file: BufferedReader, entry: Entry, name: str) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    if file.readinto(raw.data) != raw.size:
        raise TILING.broken(f"the file was cut short at tensor {name}")
    if entry.dtype == torch.bool and raw.max(initial=0) > 1:
        raise BOOLEANS.broken(f"tensor {name}")
    return tensor


def _part(file: BufferedReader, entry: Entry, name: str) -> bytes:
    if entry.dtype != torch.uint8 or len(entry.shape) != 1:
        raise BYTES.broken(f"tensor {name}")
    raw = file.read(entry.shape[0])
    if len(raw) != entry.shape[0]:
        raise TILING.broken(f"the file was cut short at tensor {name}")
    return raw


def seal_of(kind: str, version: int, content: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return what stands for a whole file: 64 hex digits."""
    return _seal(kind, version, content, {name: digest_of(tensor) for name, tensor in tensors.items()})


def _seal(kind: str, version: int, content: Any, digests: Mapping[str, bytes]) -> str:
    hashes = {name: digest.hex() for name, digest in digests.items()}
    whole = json.dumps([kind, version, content, hashes], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
