"""Sealed files: safetensors with a kind, a version, plain data and a digest of it all; whole or refused.

The digest finds damage, not malice: whoever writes a file can seal it. What is read is therefore data and
nothing else, and must be checked by those who know what it means.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nni_jackpot.errors import TicketError
from nni_jackpot.files import replace_file

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


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of any type in index order, (numel * itemsize,), on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: bytes) -> Tensor:
    """Return bytes as a tensor of their own, (n,), uint8."""
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def digest_of(tensor: Tensor) -> bytes:
    """Return SHA-256 (32 bytes) of type, shape and values: ``float32 [64, 3, 7, 7] `` and then the bytes."""
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
    TypeError, ValueError, RecursionError
        If the content is not plain.
    """
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read
    envelope = {"version": version, "content": content, "sha256": seal_of(kind, version, content, tensors)}
    # One entry: the library writes several in an order that changes from one process to the next.
    metadata = {kind: json.dumps(envelope, separators=(",", ":"))}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not the library's save_file, whose files are their owner's to read alone, whatever the umask.
    replace_file(path, lambda aside: aside.write_bytes(save(whole, metadata)))


def read_sealed(path: str | os.PathLike[str], kind: str, version: int) -> tuple[Any, dict[str, Tensor]]:
    """Read a sealed file: its plain data and its tensors, in memory of their own.

    Raises
    ------
    TicketError
        If it is missing or damaged, of another kind, or of a newer version than this one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind not in metadata:
                found = " and ".join(metadata) or "another safetensors file"
                raise TicketError(f"{path} is no {kind}, but {found}")
            # Copies: what lies in a mapped file goes when the file is cut short.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise TicketError(f"there is no {kind} {path}") from None
    except (OSError, SafetensorError) as error:
        raise TicketError(f"{path} is no {kind}, or a damaged one: {error}") from None
    try:
        envelope = json.loads(metadata[kind])
        written, content, seal = (envelope[key] for key in ("version", "content", "sha256"))
        if type(written) is int and written > version:
            raise TicketError(
                f"{path} is a {kind} of version {written}, and this nni_jackpot reads up to {version}: "
                "take a newer nni_jackpot"
            )
        if seal != seal_of(kind, written, content, tensors):
            raise TicketError(f"{path} is damaged: its digest is not that of its content")
    except TicketError:
        raise
    except (LookupError, TypeError, ValueError, RecursionError):
        raise TicketError(f"{path} is damaged: its metadata are not those of a {kind}") from None
    return content, tensors


def seal_of(kind: str, version: int, content: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return what stands for a whole file: 64 hex digits."""
    digests = {name: digest_of(tensor).hex() for name, tensor in tensors.items()}
    whole = json.dumps([kind, version, content, digests], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
