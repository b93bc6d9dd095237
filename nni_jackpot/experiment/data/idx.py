"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import DatasetNotFoundError

_MOST_BYTES = 1 << 30


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends with ``.gz``.

    Torchvision's reader accepts truncated files, and does not read gzip.

    Returns
    -------
    Tensor
        uint8 (N, *item_shape).

    Raises
    ------
    DatasetNotFoundError
        If the file cannot be read, is truncated, or is not an IDX file of such items.
    """
    # Header: 0, 0, 8 for unsigned bytes, number of dimensions, and each dimension as a big-endian uint32.
    ndim = 1 + len(item_shape)
    magic = bytes([0, 0, 8, ndim])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
            file = cast(BinaryIO, opened)
            head = file.read(4 + 4 * ndim)
            header = [int.from_bytes(head[i : i + 4], "big") for i in range(4, 4 + 4 * ndim, 4)]
            # Compressed data can be a thousand times as long: read no more than the header announces.
            content = file.read(min(math.prod(header), _MOST_BYTES) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetNotFoundError(f"{path} cannot be read: {error}") from error
    if head[:4] != magic:
        raise DatasetNotFoundError(
            f"{path} is not an IDX file of {ndim}-dimensional bytes: it begins with {head[:4].hex()}, "
            f"expected {magic.hex()}"
        )
    shape = (header[0], *item_shape)
    if tuple(header) != shape or len(content) != math.prod(shape):
        raise DatasetNotFoundError(
            f"{path} has {len(content)} bytes of data for dimensions {header}, expected "
            f"{math.prod(shape)} for {list(shape)}"
        )
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8)).view(shape)
