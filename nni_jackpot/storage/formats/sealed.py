"""Sealed files: safetensors with a kind, a version, plain data and a digest of all content.

The digest detects damage, not malice, since anyone can compute it. The content is therefore plain data, and
its meaning must be checked by the caller. The safetensors library only writes these files: its reader accepts
headers of any size and form, and takes a multiple of the header's size in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nni_jackpot.errors import TicketError
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.runtime.tensor_bytes import as_bytes
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.formats.rules import error_prefix
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

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
        *(torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in files: ``float32``."""
    return str(dtype).removeprefix("torch.")


def digest_of(tensor: Tensor) -> bytes:
    """Return the SHA-256 (32 bytes) of ``float32 [64, 3, 7, 7] `` (dtype and shape), then the values."""
    digest = hashlib.sha256(f"{name_of(tensor.dtype)} {list(tensor.shape)} ".encode())
    digest.update(as_bytes(tensor).numpy().data)
    return digest.digest()


def write_sealed(
    path: str | os.PathLike[str], kind: str, version: int, content: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Write a sealed file.

    Parameters
    ----------
    path
        The file; a missing folder is created.
    kind, version
        Kind of the file, and version of its format.
    content
        Plain data that JSON can represent.
    tensors
        Tensors by name, which must not share memory.

    Raises
    ------
    OutputFolderError
        If the folder cannot be written. The write is atomic.
    TicketError
        If safetensors does not support the dtype of a tensor, or the reader would refuse the file because its
        content is too large, too deep or ambiguous.
    TypeError, ValueError, RecursionError
        If JSON cannot represent the content.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES.values():
            raise TicketError(f"no {kind} can hold {escaped(name)}, of type {name_of(tensor.dtype)}")
    text = json.dumps(content, allow_nan=False)
    content = json.loads(text, object_pairs_hook=object_of)  # as the reader will see it
    envelope = {"version": version, "content": content, "sha256": seal_of(kind, version, content, tensors)}
    # A single entry: the library writes several entries in an order that differs between processes.
    metadata = {kind: json.dumps(envelope, separators=(",", ":"))}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = save(whole, metadata)
    with error_prefix(f"{path} would not be a readable {kind}"):
        header_of(io.BytesIO(raw), len(raw))
        envelope_of(metadata, kind, len(raw))
    # Not the library's save_file: it ignores the umask and makes files readable by their owner only.
    replace_file(path, lambda temporary: temporary.write_bytes(raw))


def read_sealed(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Any, dict[str, Tensor]]:
    """Read a sealed file, and return its plain data and its tensors.

    Raises
    ------
    TicketError
        If the file is missing, damaged, of another kind, or of a newer version than ``version``.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise TicketError(f"{path} is not a {kind}, and not a regular file")
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with error_prefix(f"{path} is not a {kind}, or is damaged"):
                metadata, entries = header_of(file, size)
            if kind not in metadata:
                found = escaped(" and ".join(metadata)) or "another safetensors file"
                raise TicketError(f"{path} is not a {kind}, but {found}")
            with error_prefix(f"{path} is damaged"):
                envelope = envelope_of(metadata, kind, size)
            if is_newer(envelope, version):
                raise TicketError(
                    f"{path} is a {kind} of version {envelope['version']}, and this nni_jackpot reads up to "
                    f"{version}: take a newer nni_jackpot"
                )
            with error_prefix(f"{path} is damaged"):
                return _sealed_in(file, entries, kind, envelope)
    except TicketError:
        raise
    except FileNotFoundError:
        raise TicketError(f"there is no {kind} {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TicketError(f"{escaped(path)} is not a readable {kind}: {escaped(error)}") from None


def read_parts(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Any, dict[str, bytes]]:
    """Read a sealed file whose tensors are bytes, and return its plain data and these bytes.

    Raises
    ------
    TicketError
        As `read_sealed` does; and if a tensor is of another type, or of more than one dimension.
    """
    content, tensors = read_sealed(path, kind, version)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            with error_prefix(f"{path} is damaged"):
                raise BYTES.broken(f"tensor {name}")
    return content, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def _sealed_in(
    file: BufferedReader, entries: Mapping[str, Entry], kind: str, envelope: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Check the digest, and return the plain data and the tensors; ``file`` must be at the first tensor."""
    check_envelope(envelope)
    begin, tensors = file.tell(), {}
    for name, entry in entries.items():
        file.seek(begin + entry.begin)
        tensors[name] = read_tensor(file, entry, name)
    if envelope["sha256"] != seal_of(kind, envelope["version"], envelope["content"], tensors):
        raise DIGEST.broken("its digest")
    return envelope["content"], tensors


def read_tensor(file: BufferedReader, entry: Entry, name: str) -> Tensor:
    """Read the tensor that begins at the current byte of a file.

    Raises
    ------
    TicketError
        If the file ends before the tensor does, or a boolean is neither 0 nor 1.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    if file.readinto(raw.data) != raw.size:
        raise TILING.broken(f"the file was cut short at tensor {name}")
    if entry.dtype == torch.bool and raw.max(initial=0) > 1:
        raise BOOLEANS.broken(f"tensor {name}")
    return tensor


def seal_of(kind: str, version: int, content: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of a whole file, as 64 hexadecimal digits."""
    hashes = {name: digest_of(tensor).hex() for name, tensor in tensors.items()}
    whole = json.dumps([kind, version, content, hashes], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
