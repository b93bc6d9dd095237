"""IDX files, the format of MNIST and its kin."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from nni_jackpot.errors import DatasetNotFoundError


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends with ``.gz``.

    Torchvision's reader takes files cut short for whole ones, and no gzip.

    Returns
    -------
    Tensor
        uint8 (N, *item_shape).

    Raises
    ------
    DatasetNotFoundError
        If the file cannot be read, is cut short, or is no IDX file of such items.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetNotFoundError(f"{path} cannot be read: {error}") from error
    # Header: 0, 0, 8 for unsigned bytes, number of dimensions, and each dimension as a big-endian uint32.
    ndim = 1 + len(item_shape)
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        raise DatasetNotFoundError(
            f"{path} is no IDX file of {ndim}-dimensional bytes: it begins with {content[:4].hex()}, "
            f"expected {magic.hex()}"
        )
    start = 4 + 4 * ndim
    header = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    shape = (header[0], *item_shape)
    if tuple(header) != shape or len(content) - start != math.prod(shape):
        raise DatasetNotFoundError(
            f"{path} has {len(content) - start} bytes of data for dimensions {header}, expected "
            f"{math.prod(shape)} for {list(shape)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)
