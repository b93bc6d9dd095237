from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.data.idx import read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("item_shape", [(), (3,), (2, 5)])
def test_read_idx(tmp_path: Path, name: str, item_shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(256, size=(7, *item_shape))
    read = read_idx(write(tmp_path / name, idx_bytes(array)), item_shape)
    assert read.dtype == torch.uint8
    assert read.numpy().tolist() == array.tolist()


GOOD = idx_bytes(np.zeros((3, 2, 2)))
ZIPPED = gzip.compress(GOOD, mtime=0)  # no time of day, which would be in the names of tests


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "begins with"),
        (GOOD[:3], "begins with"),
        (b"PNG!" + GOOD[4:], "begins with 504e4721, expected 00000803"),
        (bytes([0, 0, 9, 3]) + GOOD[4:], "begins with"),
        (idx_bytes(np.zeros(3)), "begins with 00000801, expected 00000803"),
        (GOOD[:10], "expected"),
        (GOOD[:16], "has 0 bytes of data for dimensions [3, 2, 2], expected 12"),
        (GOOD[:-1], "has 11 bytes of data for dimensions [3, 2, 2], expected 12"),
        (GOOD + b"\0", "has 13 bytes of data"),
        (idx_bytes(np.zeros((2, 3, 2))), "dimensions [2, 3, 2], expected 8 for [2, 2, 2]"),
    ],
)
@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_read_idx_rejects(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DatasetNotFoundError) as caught:
        read_idx(path, (2, 2))
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [ZIPPED[:-9], ZIPPED[:12], GOOD, ZIPPED[:10] + b"\xff" * 30],
)
def test_read_idx_rejects_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetNotFoundError, match=r"images\.gz cannot be read"):
        read_idx(path, (2, 2))


def test_read_idx_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="cannot be read"):
        read_idx(tmp_path / "none", ())
