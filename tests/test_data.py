from __future__ import annotations

import gzip
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment import data as data_module
from nni_jackpot.experiment.config import DataConfig
from nni_jackpot.experiment.data import (
    FASHION_MNIST_ROOT,
    DatasetSpec,
    EpochShuffle,
    ImageTensors,
    load_data,
    read_idx,
)

DIGITS = DataConfig(name="digits")
NAMES = [
    f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def small_fashion_mnist(root: Path, suffix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(256, size=(size, 28, 28)) if "images" in name else np.arange(size) % 10
        for name, size in zip(NAMES, (50, 50, 20, 20), strict=True)
    }
    for name, array in arrays.items():
        write(root / f"{name}{suffix}", idx_bytes(array))
    return arrays


def epoch(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# -- digits


def test_digits_batches() -> None:
    data = load_data(DIGITS, seed=0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 8)
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert len(next(iter(data.test))[1]) == 360
    assert len(data.train) == len(list(data.train)) == 23
    assert (len(data.train.dataset), len(data.test.dataset)) == (1437, 360)  # type: ignore[arg-type]


def test_training_images_are_normalised_and_test_images_alike() -> None:
    data = load_data(DIGITS, seed=0)
    images, _ = epoch(data.train)
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-4)
    black = epoch(data.test)[0].min()
    assert black == images.min()


def test_split_is_stratified_and_the_same_at_every_seed() -> None:
    first, second = (load_data(DIGITS, seed=seed) for seed in (0, 1))
    for a, b in zip(epoch(first.test), epoch(second.test), strict=True):
        assert torch.equal(a, b)
    shares = torch.bincount(epoch(first.test)[1]) / torch.bincount(epoch(first.train)[1])
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_test_images_keep_their_order() -> None:
    loader = load_data(DataConfig(name="digits", eval_batch_size=100, augment=True), seed=0).test
    assert [len(labels) for _, labels in loader] == [100, 100, 100, 60]
    assert torch.equal(epoch(loader)[0], epoch(loader)[0])


# -- order


@pytest.mark.parametrize("augment", [False, True])
def test_same_seed_same_sequence_of_epochs(augment: bool) -> None:
    config = DataConfig(name="digits", augment=augment)
    first, second = (load_data(config, seed=3).train for _ in range(2))
    for _ in range(2):
        a, b = epoch(first), epoch(second)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_each_epoch_has_an_order_of_its_own_and_all_images() -> None:
    loader = load_data(DIGITS, seed=0).train
    (_, first), (_, second) = epoch(loader), epoch(loader)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_each_seed_has_an_order_of_its_own() -> None:
    assert not torch.equal(epoch(load_data(DIGITS, 0).train)[1], epoch(load_data(DIGITS, 1).train)[1])


def test_epoch_can_be_chosen() -> None:
    first, second = EpochShuffle(20, 4, seed=0), EpochShuffle(20, 4, seed=0)
    list(first)
    second.epoch = 1
    assert list(first) == list(second)
    assert first.epoch == 2


@pytest.mark.parametrize(("size", "sizes"), [(12, [4, 4, 4]), (14, [4, 4, 4, 2]), (13, [4, 4, 4]), (3, [3])])
def test_last_batch_is_kept_unless_it_is_a_single_image(size: int, sizes: list[int]) -> None:
    order = EpochShuffle(size, 4, seed=0)
    batches = list(order)
    assert [len(batch) for batch in batches] == sizes
    assert len(order) == len(sizes)
    assert len({*chain(*batches)}) == sum(sizes)


def test_dropped_image_is_another_in_each_epoch() -> None:
    order = EpochShuffle(13, 4, seed=0)
    dropped = {(set(range(13)) - {*chain(*order)}).pop() for _ in range(10)}
    assert len(dropped) > 1


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(augment: bool) -> None:
    own, others = (
        load_data(DataConfig(name="digits", augment=augment, workers=workers), seed=0).train
        for workers in (0, 2)
    )
    for _ in range(2):
        for a, b in zip(epoch(own), epoch(others), strict=True):
            assert torch.equal(a, b)


def test_global_generator_is_left_alone() -> None:
    loader = load_data(DataConfig(name="digits", augment=True), seed=0).train
    before = torch.get_rng_state()
    epoch(loader)
    assert torch.equal(before, torch.get_rng_state())


# -- augmentation


def in_memory(images: Tensor, max_shift: int) -> ImageTensors:
    one = torch.ones(1, images.shape[1], 1, 1)
    return ImageTensors(images, torch.arange(len(images)), 0 * one, one, max_shift)


def test_shift_moves_whole_images_by_whole_pixels() -> None:
    n, channels, size, reach = 200, 3, 6, 2
    images = torch.randint(1, 256, (n, channels, size, size), dtype=torch.uint8)
    shifted, labels = in_memory(images, reach).__getitems__(range(n))
    assert torch.equal(labels, torch.arange(n))
    padded = torch.nn.functional.pad(images, [reach] * 4).float()
    seen = set()
    for before, after in zip(padded, shifted, strict=True):
        (offset,) = (
            (y, x)
            for y in range(2 * reach + 1)
            for x in range(2 * reach + 1)
            if torch.equal(before[:, y : y + size, x : x + size], after)
        )
        seen.add(offset)
    assert len(seen) == (2 * reach + 1) ** 2


def test_shifts_differ_between_batches() -> None:
    images = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8)
    dataset = in_memory(images, 2)
    first, second = dataset.__getitems__(range(8))[0], dataset.__getitems__(range(7, -1, -1))[0].flip(0)
    assert not torch.equal(first, second)


def test_single_image() -> None:
    images = torch.randint(256, (4, 1, 6, 6), dtype=torch.uint8)
    image, label = in_memory(images, 0)[2]
    assert torch.equal(image, images[2].float())
    assert label == 2


def test_augmentation_is_for_training_only() -> None:
    plain, augmented = (load_data(DataConfig(name="digits", augment=a), seed=0) for a in (False, True))
    assert torch.equal(epoch(plain.test)[0], epoch(augmented.test)[0])
    (plain_images, plain_labels), (images, labels) = epoch(plain.train), epoch(augmented.train)
    assert torch.equal(plain_labels, labels)
    assert not torch.equal(plain_images, images)
    assert plain_images.min() == images.min()


def test_datasets_that_load_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Squares(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((1, 2, 2), float(index)), index

    spec = DatasetSpec(10, 1, 2)
    monkeypatch.setitem(data_module.DATASETS, "digits", lambda config: (Squares(), Squares(), spec))
    data = load_data(DataConfig(name="digits", batch_size=4, eval_batch_size=8), seed=0)
    images, labels = epoch(data.train)
    assert images.shape == (10, 1, 2, 2)
    assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert epoch(data.test)[1].tolist() == list(range(10))


# -- Fashion-MNIST


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist(tmp_path: Path, suffix: str) -> None:
    arrays = small_fashion_mnist(tmp_path, suffix)
    data = load_data(DataConfig(name="fashion_mnist", root=str(tmp_path), batch_size=16), seed=0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert [len(labels) for _, labels in data.train] == [16, 16, 16, 2]
    images, labels = epoch(data.test)
    pixels = arrays["train-images-idx3-ubyte"]
    expected = (arrays["t10k-images-idx3-ubyte"] - pixels.mean()) / pixels.std(ddof=1)
    assert np.allclose(images[:, 0].numpy(), expected, atol=1e-4)
    assert labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def fashion_error(root: Path) -> str:
    with pytest.raises(DatasetNotFoundError) as caught:
        load_data(DataConfig(name="fashion_mnist", root=str(root)), seed=0)
    return str(caught.value)


def test_missing_files_are_listed_with_the_remedy(tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    for name in (NAMES[0], NAMES[3]):
        (tmp_path / name).unlink()
    said = fashion_error(tmp_path)
    assert f"{tmp_path} lacks {NAMES[0]}[.gz], {NAMES[3]}[.gz]" in said
    assert "apt-get install dataset-fashion-mnist" in said
    assert "data.root" in said


def test_missing_folder(tmp_path: Path) -> None:
    said = fashion_error(tmp_path / "none")
    assert all(name in said for name in NAMES)


def test_default_folder_is_debians(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    monkeypatch.setattr(data_module, "FASHION_MNIST_ROOT", str(tmp_path))
    assert len(load_data(DataConfig(name="fashion_mnist"), seed=0).train.dataset) == 50  # type: ignore[arg-type]


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    write(tmp_path / NAMES[1], idx_bytes(np.zeros(49)))
    said = fashion_error(tmp_path)
    assert f"{NAMES[0]} holds 50 images" in said
    assert f"{NAMES[1]} holds 49 labels" in said


def test_no_images(tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    write(tmp_path / NAMES[2], idx_bytes(np.zeros((0, 28, 28))))
    write(tmp_path / NAMES[3], idx_bytes(np.zeros(0)))
    assert "holds 0 images" in fashion_error(tmp_path)


def test_label_out_of_range(tmp_path: Path) -> None:
    small_fashion_mnist(tmp_path)
    write(tmp_path / NAMES[1], idx_bytes(np.full(50, 10)))
    said = fashion_error(tmp_path)
    assert NAMES[1] in said
    assert "label 10, allowed: 0 to 9" in said


@pytest.mark.skipif(not Path(FASHION_MNIST_ROOT).is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_itself() -> None:
    data = load_data(DataConfig(name="fashion_mnist", batch_size=1000), seed=0)
    images, labels = epoch(data.train)
    assert images.shape == (60000, 1, 28, 28)
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert torch.bincount(epoch(data.test)[1]).tolist() == [1000] * 10


# -- IDX


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("item_shape", [(), (3,), (2, 5)])
def test_read_idx(tmp_path: Path, name: str, item_shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(256, size=(7, *item_shape))
    read = read_idx(write(tmp_path / name, idx_bytes(array)), item_shape)
    assert read.dtype == torch.uint8
    assert read.numpy().tolist() == array.tolist()


GOOD = idx_bytes(np.zeros((3, 2, 2)))


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
    [gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:12], GOOD, gzip.compress(GOOD)[:10] + b"\xff" * 30],
)
def test_read_idx_rejects_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DatasetNotFoundError, match=r"images\.gz cannot be read"):
        read_idx(path, (2, 2))


def test_read_idx_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="cannot be read"):
        read_idx(tmp_path / "none", ())
