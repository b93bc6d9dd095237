from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.data.images import ImageFiles, ImageTensors

# -- in memory


def in_memory(
    images: Tensor, max_shift: int = 0, flip: bool = False, size: int | None = None
) -> ImageTensors:
    zeros = torch.zeros(images.shape[1])
    size = size or images.shape[2]
    return ImageTensors(images, torch.arange(len(images)), zeros, zeros + 1, size, max_shift, flip)


def test_normalised_by_channel() -> None:
    pixels = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 2.0, 4.0])
    images = ImageTensors(pixels, torch.arange(4), mean, std, size=6)
    batch, labels = images.__getitems__([2, 0])
    assert (images.shape, len(images)) == ((3, 6, 6), 4)
    assert labels.tolist() == [2, 0]
    assert torch.equal(batch[0, 1], (pixels[2, 1].float() - 20) / 2)
    assert torch.equal(batch[1, 2], (pixels[0, 2].float() - 30) / 4)


def places(before: Tensor, after: Tensor, reach: int) -> set[tuple[int, int]]:
    """Return the offsets at which an image (C, S, S) lies within itself, padded by ``reach``."""
    size = before.shape[2]
    padded = F.pad(before, [reach] * 4).float()
    spots = [(y, x) for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
    return {(y, x) for y, x in spots if torch.equal(padded[:, y : y + size, x : x + size], after)}


def test_shift_moves_whole_images_by_whole_pixels() -> None:
    n, reach = 200, 2
    pixels = torch.randint(1, 256, (n, 3, 6, 6), dtype=torch.uint8)
    shifted, labels = in_memory(pixels, reach).__getitems__(range(n))
    assert torch.equal(labels, torch.arange(n))
    found = [places(before, after, reach) for before, after in zip(pixels, shifted, strict=True)]
    assert {len(offsets) for offsets in found} == {1}
    assert len(set.union(*found)) == (2 * reach + 1) ** 2


def test_half_of_the_images_are_mirrored() -> None:
    n, reach = 400, 1
    pixels = torch.randint(1, 256, (n, 3, 6, 6), dtype=torch.uint8)
    varied, _ = in_memory(pixels, reach, flip=True).__getitems__(range(n))
    mirrored = [
        len(places(before, after, reach)) - len(places(before, after.flip(2), reach))
        for before, after in zip(pixels, varied, strict=True)
    ]
    assert {*mirrored} == {-1, 1}
    assert 0.4 < mirrored.count(-1) / n < 0.6


def test_what_is_random_follows_the_batch() -> None:
    pixels = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8)
    images = in_memory(pixels, 2, flip=True)
    first, again = images.__getitems__(range(8))[0], images.__getitems__(range(8))[0]
    assert torch.equal(first, again)
    beside_others = [images.__getitems__([0, other])[0][0] for other in range(1, 8)]
    assert not all(torch.equal(beside_others[0], view) for view in beside_others)


def test_resized_after_it_is_shifted() -> None:
    pixels = torch.randint(1, 256, (50, 1, 6, 6), dtype=torch.uint8)
    images = in_memory(pixels, 1, size=12)
    small, large = in_memory(pixels, 1).__getitems__(range(50))[0], images.__getitems__(range(50))[0]
    assert images.shape == (1, 12, 12)
    assert torch.equal(large, v2.functional.resize(small.to(torch.uint8), [12, 12]).float())


def test_blank_batches_take_no_memory() -> None:
    images, labels = in_memory(torch.zeros(2, 3, 6, 6, dtype=torch.uint8)).blank(1000)
    wanted = in_memory(torch.zeros(2, 3, 6, 6, dtype=torch.uint8)).__getitems__([0, 1])
    assert (images.shape, labels.shape) == ((1000, 3, 6, 6), (1000,))
    assert (images.dtype, labels.dtype) == (wanted[0].dtype, wanted[1].dtype)
    assert images.untyped_storage().nbytes() == 4


# -- in files


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    names = ["a.png", "b.png", "ü ö.png"]
    for name in names:
        Image.fromarray(rng.integers(256, size=(12, 9, 3), dtype=np.uint8)).save(tmp_path / name)
    return [str(tmp_path / name) for name in names]


def in_files(paths: list[str], *steps: v2.Transform, size: int = 6) -> ImageFiles:
    transform = v2.Compose([*steps, v2.PILToTensor()])
    return ImageFiles(
        paths, torch.arange(len(paths)), torch.zeros(3), torch.ones(3), transform, (3, size, size)
    )


def test_files_are_read_in_the_order_of_the_batch(paths: list[str]) -> None:
    batch, labels = in_files(paths, v2.CenterCrop(6)).__getitems__([2, 0])
    assert labels.tolist() == [2, 0]
    for image, path in zip(batch, (paths[2], paths[0]), strict=True):
        whole = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert torch.equal(image, whole[:, 3:9, 2:8].float())


def test_crops_follow_the_batch_and_leave_the_global_generator_alone(paths: list[str]) -> None:
    images = in_files(paths, v2.RandomResizedCrop(6), v2.RandomHorizontalFlip())
    before = torch.get_rng_state()
    first = images.__getitems__([0, 1, 2])[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(9)
    assert torch.equal(first, images.__getitems__([0, 1, 2])[0])
    assert not torch.equal(first[0], images.__getitems__([0, 2, 1])[0][0])


def test_images_of_one_file_are_varied_each_in_its_own_way(paths: list[str]) -> None:
    first, second = in_files(paths, v2.RandomResizedCrop(6)).__getitems__([0, 0])[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (8, 8)).save(path)
    assert in_files([str(path)], v2.CenterCrop(6)).__getitems__([0])[0].shape == (1, 3, 6, 6)


def test_damaged_files_are_named(tmp_path: Path, paths: list[str]) -> None:
    content = Path(paths[1]).read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name in ("empty.png", "text.jpg", "cut.png", "none.png"):
        path = str(tmp_path / name)
        error = in_files([paths[0], path], v2.CenterCrop(6)).__getitems__([0, 1])
        assert isinstance(error, DatasetNotFoundError)
        assert f"{path} cannot be read as an image: " in str(error)
