"""Files of a dataset that would fill the memory, never end, or run a program."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from nni_jackpot.cli.boundary import Exit, way_out
from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.data.idx import read_idx
from nni_jackpot.experiment.data.images import ImageFiles, Images
from nni_jackpot.experiment.data.loading import Loader, load_data
from nni_jackpot.experiment.data.section import DataConfig

# -- images


def png(width: int, height: int) -> bytes:
    """Return an image of one colour, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def said_of(path: Path) -> str:
    """Return the error for an image that is refused, which comes without a warning."""
    transform = v2.Compose([v2.Resize(8), v2.CenterCrop(6), v2.PILToTensor()])
    labels = torch.zeros(1, dtype=torch.int64)
    images = ImageFiles([str(path)], labels, torch.zeros(3), torch.ones(3), transform, (3, 6, 6))
    error = images.__getitems__([0])
    assert isinstance(error, DatasetNotFoundError)
    assert f"{path} cannot be read as an image: " in str(error)
    return str(error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 10_000)])
def test_images_of_more_pixels_than_memory(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    assert "bomb" in said_of(path)


@pytest.mark.parametrize(("width", "height"), [(60_000, 1), (1, 60_000), (1000, 10)])
def test_lines_that_resizing_would_make_huge(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    path.write_bytes(png(width, height))
    assert f"{width} x {height} pixels are too long and narrow" in said_of(path)


def test_text_that_unpacks_to_more_than_memory(tmp_path: Path) -> None:
    content = png(8, 8)
    text = b"zTXtcomment\0\0" + zlib.compress(bytes(1 << 27))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path = tmp_path / "text.png"
    path.write_bytes(content[:33] + chunk + content[33:])
    said_of(path)


def test_a_program_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert "Ghostscript" in said_of(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image.png")
    assert "it is not a file" in said_of(tmp_path / "image.png")


@pytest.mark.parametrize(
    "start", [b"II*\0", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff", b"P6\n9 9\n"]
)
def test_damaged_files_of_any_format(start: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / f"{number}.png"
        path.write_bytes(start + rng.bytes(int(rng.integers(200))))
        said_of(path)


# -- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / part / name / "0.png")
    return tmp_path / "images"


def error_of(folder: Path) -> str:
    with pytest.raises(DatasetNotFoundError) as caught:
        load_data(DataConfig(name="image_folder", root=str(folder), image_size=8, batch_size=2), seed=0)
    return str(caught.value)


@pytest.mark.parametrize("to", [".", "..", "../..", "../../..", "../dog/more/../../cat"])
def test_links_that_go_round(to: str, folder: Path) -> None:
    (folder / "train" / "dog" / "more").mkdir()
    for name in ("one", "two"):  # of which the ways double at every turn
        (folder / "train" / "cat" / name).symlink_to(to)
    said = error_of(folder)
    assert "again, by a link" in said


def test_links_that_double_at_every_step(folder: Path, tmp_path: Path) -> None:
    place = folder / "train" / "cat"
    for level in range(40):
        below = tmp_path / f"level{level}"
        below.mkdir()
        for name in ("a", "b"):
            (place / name).symlink_to(below)
        place = below
    assert "again, by a link" in error_of(folder)


def test_a_link_to_images_elsewhere_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "cat").rename(tmp_path / "elsewhere")
    (folder / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    data = load_data(DataConfig(name="image_folder", root=str(folder), image_size=8, batch_size=2), seed=0)
    assert sum(data.train.order.sizes) == 2


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000])
@pytest.mark.parametrize("data", ["image_folder", "mnist", "cifar10"])
def test_roots_that_no_file_system_has(data: str, name: str) -> None:
    with pytest.raises(DatasetNotFoundError):
        load_data(DataConfig(name=data, root=name), seed=0)


def test_a_root_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for data in ("image_folder", "mnist", "cifar10"):
        with pytest.raises(DatasetNotFoundError):
            load_data(DataConfig(name=data, root=str(tmp_path / "loop")), seed=0)


# -- IDX


def test_what_is_zipped_is_read_as_far_as_it_should_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.gz"
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 28, 28)
    path.write_bytes(gzip.compress(header + bytes(1 << 27)))  # 130 kB
    asked: list[int] = []
    read = gzip.GzipFile.read

    def reading(self: gzip.GzipFile, size: int = -1) -> bytes:
        asked.append(size)
        return read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", reading)
    with pytest.raises(DatasetNotFoundError, match="has 1569 bytes of data"):
        read_idx(path, (28, 28))
    assert asked == [16, 1569]


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 28, 28) + bytes(28))
    with pytest.raises(DatasetNotFoundError, match="has 28 bytes of data"):
        read_idx(path, (28, 28))


# -- processes that load


class Fatal(Images):
    """Images whose process is killed, as by a system that is out of memory."""

    def __init__(self, number: int) -> None:
        super().__init__(torch.zeros(8, dtype=torch.int64), (1, 1, 1), torch.zeros(1), torch.ones(1))
        self._number = number

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), self._number)
        return torch.zeros(len(at), 1, 1, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_a_line(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert way_out(lambda: list(Loader(Fatal(number), [[3]], 1, seed=0))) == Exit.FAILED
    lines = [line for line in capfd.readouterr().err.splitlines() if "nni-jackpot" in line]
    assert len(lines) == 1
    assert "a process that loads data was lost" in lines[0]


def test_an_interruption_is_left_to_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    loader = Loader(Fatal(signal.SIGINT), [[3], [4]], 1, seed=0)
    assert len(list(loader)) == 2
    assert capfd.readouterr().err == ""
