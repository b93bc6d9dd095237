from __future__ import annotations

import hashlib
import pickle
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from test_idx import idx_bytes, write
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.transforms import v2

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.data import datasets
from nni_jackpot.experiment.data.datasets import (
    FASHION_MNIST_ROOT,
    Loaded,
)
from nni_jackpot.experiment.data.images import Images
from nni_jackpot.experiment.data.preprocess import IMAGENET
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import DATASETS

NAMES = [
    f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


def load(name: str, **options: Any) -> Loaded:
    config = DataConfig(name=name, **options)
    return DATASETS.find(name).load(config)


def everything(images: Images) -> tuple[Tensor, Tensor]:
    batch = images.__getitems__(range(len(images)))
    assert isinstance(batch, tuple)
    return batch


def error_of(name: str, **options: Any) -> str:
    with pytest.raises(DatasetNotFoundError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_augmentation(name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Check that training images alone are varied; return them as they are and varied."""
    plain, augmented = (load(name, augment=augment, **options) for augment in (False, True))
    assert torch.equal(everything(plain.test)[0], everything(augmented.test)[0])
    assert torch.equal(everything(plain.unvaried)[0], everything(augmented.unvaried)[0])
    (before, labels), (after, same_labels) = everything(plain[0]), everything(augmented[0])
    assert torch.equal(labels, same_labels)
    assert before.shape == after.shape
    assert not torch.equal(before, after)
    return before, after


# -- digits


def test_digits() -> None:
    train, _, test, classes, *_ = load("digits")
    assert (len(train), len(test), classes, train.shape) == (1437, 360, 10, (1, 8, 8))


def test_training_images_are_normalised_and_test_images_alike() -> None:
    train, _, test, _, *_ = load("digits")
    images, _ = everything(train)
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-4)
    black = everything(test)[0].min()
    assert black == images.min()


def test_split_is_stratified() -> None:
    train, _, test, _, *_ = load("digits")
    shares = torch.bincount(test.labels) / torch.bincount(train.labels)
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_digits_shift() -> None:
    before, after = check_augmentation("digits")
    assert before.min() == after.min()


def test_images_of_another_size() -> None:
    train, _, test, _, *_ = load("digits", image_size=32)
    assert train.shape == test.shape == everything(test)[0].shape[1:] == (1, 32, 32)


# -- MNIST and Fashion-MNIST


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, idx_bytes(array))


def small_mnist(root: Path, suffix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(256, size=(size, 28, 28)) if "images" in name else np.arange(size) % 10
        for name, size in zip(NAMES, (50, 50, 20, 20), strict=True)
    }
    for name, array in arrays.items():
        write_idx(root / f"{name}{suffix}", array)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion_mnist", "."), ("fashion_mnist", "FashionMNIST/raw"), ("mnist", "."), ("mnist", "MNIST/raw")],
)
def test_mnist(tmp_path: Path, name: str, folder: str, suffix: str) -> None:
    arrays = small_mnist(tmp_path / folder, suffix)
    train, _, test, classes, *_ = load(name, root=str(tmp_path))
    assert (len(train), classes, train.shape) == (50, 10, (1, 28, 28))
    images, labels = everything(test)
    pixels = arrays["train-images-idx3-ubyte"]
    expected = (arrays["t10k-images-idx3-ubyte"] - pixels.mean()) / pixels.std(ddof=1)
    assert np.allclose(images[:, 0].numpy(), expected, atol=1e-4)
    assert labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    check_augmentation(name, root=str(tmp_path))


def test_missing_files_are_listed_with_the_remedy(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    for name in (NAMES[0], NAMES[3]):
        (tmp_path / name).unlink()
    said = error_of("fashion_mnist", root=str(tmp_path))
    assert f"{tmp_path} lacks {NAMES[0]}[.gz], {NAMES[3]}[.gz] of FashionMNIST" in said
    assert "apt-get install dataset-fashion-mnist" in said
    assert "data.root" in said
    said = error_of("mnist", root=str(tmp_path))
    assert "of MNIST: set data.root" in said
    assert "data.download" in said


def test_missing_folder(tmp_path: Path) -> None:
    said = error_of("mnist", root=str(tmp_path / "none"))
    assert all(name in said for name in NAMES)


def test_usual_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "FASHION_MNIST_ROOT", str(tmp_path / "debian"))
    small_mnist(tmp_path / "debian")
    assert len(load("fashion_mnist")[0]) == 50
    assert error_of("mnist").startswith("data lacks")
    small_mnist(tmp_path / "data")
    assert len(load("mnist")[0]) == 50


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    write_idx(tmp_path / NAMES[1], np.zeros(49))
    said = error_of("mnist", root=str(tmp_path))
    assert f"{NAMES[0]} holds 50 images" in said
    assert f"{NAMES[1]} holds 49 labels" in said


def test_no_images(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    write_idx(tmp_path / NAMES[2], np.zeros((0, 28, 28)))
    write_idx(tmp_path / NAMES[3], np.zeros(0))
    assert "holds 0 images" in error_of("mnist", root=str(tmp_path))


def test_label_out_of_range(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    write_idx(tmp_path / NAMES[1], np.full(50, 10))
    said = error_of("mnist", root=str(tmp_path))
    assert NAMES[1] in said
    assert "label 10, allowed: 0 to 9" in said


@pytest.mark.skipif(not Path(FASHION_MNIST_ROOT).is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_itself() -> None:
    train, _, test, _, *_ = load("fashion_mnist")
    images, labels = everything(train)
    assert images.shape == (60000, 1, 28, 28)
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10


# -- CIFAR


def small_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Write a small dataset in CIFAR's format, whose checksums torchvision takes for the right ones."""
    rng = np.random.default_rng(0)
    fine, classes = (False, 10) if kind is CIFAR10 else (True, 100)
    written: dict[str, dict[str, Any]] = {}

    def dump(name: str, content: dict[str, Any]) -> str:
        path = root / kind.base_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        written[name] = content
        return hashlib.md5(path.read_bytes()).hexdigest()

    def part(entries: list[list[str]]) -> list[list[str]]:
        checksums = []
        for name, _ in entries:
            labels = [int(label) for label in rng.integers(classes, size=20)]
            pixels = rng.integers(256, size=(20, 3072), dtype=np.uint8)
            content: dict[str, Any] = {"data": pixels, "fine_labels" if fine else "labels": labels}
            if fine:
                content["coarse_labels"] = [label // 5 for label in labels]
            checksums.append([name, dump(name, content)])
        return checksums

    monkeypatch.setattr(kind, "train_list", part(kind.train_list))
    monkeypatch.setattr(kind, "test_list", part(kind.test_list))
    md5 = dump(kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return written


CIFARS = [("cifar10", CIFAR10, 100, 10), ("cifar100", CIFAR100, 20, 100)]


@pytest.mark.parametrize(("name", "kind", "size", "classes"), CIFARS)
def test_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any, size: int, classes: int
) -> None:
    written = small_cifar(tmp_path, kind, monkeypatch)
    train, _, test, found, *_ = load(name, root=str(tmp_path))
    assert (len(train), len(test), found, train.shape) == (size, 20, classes, (3, 32, 32))
    content = written[kind.test_list[0][0]]
    images, labels = everything(test)
    assert labels.tolist() == content.get("fine_labels", content.get("labels"))
    pixels = np.concatenate([written[entry[0]]["data"] for entry in kind.train_list]).reshape(-1, 3, 1024)
    expected = content["data"].reshape(-1, 3, 1024) - pixels.mean((0, 2))[None, :, None]
    expected = expected / pixels.std((0, 2), ddof=1)[None, :, None]
    assert np.allclose(images.reshape(-1, 3, 1024).numpy(), expected, atol=1e-4)


def test_cifar_is_cropped_and_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(tmp_path, CIFAR10, monkeypatch)
    before, after = check_augmentation("cifar10", root=str(tmp_path))
    # Whatever the crop of 32 pixels out of 40 was, the middle of an image is still there.
    middles = [image[:, 4:-4, 4:-4] for image in before]
    there = [
        [
            any(torch.equal(view[:, y : y + 24, x : x + 24], middle) for y in range(9) for x in range(9))
            for view in (varied, varied.flip(2))
        ]
        for middle, varied in zip(middles, after, strict=True)
    ]
    assert all(sum(ways) == 1 for ways in there)
    assert 0.3 < sum(mirrored for _, mirrored in there) / len(there) < 0.7


def test_damaged_and_missing_files_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(tmp_path, CIFAR10, monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # is not unpickled
    (folder / "test_batch").unlink()
    said = error_of("cifar10", root=str(tmp_path))
    assert f"{folder} is not CIFAR10 as published: data_batch_2 (damaged), test_batch (missing);" in said
    assert "data.root to the folder that holds cifar-10-batches-py, or data.download to true" in said


# -- downloads


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mnist", MNIST), ("fashion_mnist", FashionMNIST), ("cifar10", CIFAR10), ("cifar100", CIFAR100)],
)
def test_downloads_go_to_the_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def download(self: Any) -> None:
        if issubclass(kind, MNIST):
            small_mnist(Path(self.raw_folder))
        else:
            small_cifar(Path(self.root), kind, monkeypatch)

    monkeypatch.setattr(kind, "download", download)
    assert load(name, download=True).test.labels.shape == (20,)
    assert load(name, download=True, root="elsewhere").test.labels.shape == (20,)
    assert Path("data").is_dir()
    assert Path("elsewhere").is_dir()
    assert load(name, root="elsewhere").test.labels.shape == (20,)


@pytest.mark.parametrize(
    "error",
    [URLError("no network"), RuntimeError("Error\nTried a"), IncompleteRead(b""), OSError("disk full")],
)
@pytest.mark.parametrize(("name", "kind"), [("mnist", MNIST), ("cifar10", CIFAR10)])
def test_failed_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any, error: Exception
) -> None:
    def download(self: Any) -> None:
        raise error

    monkeypatch.setattr(kind, "download", download)
    said = error_of(name, download=True, root=str(tmp_path))
    assert said.startswith(f"{kind.__name__} cannot be downloaded into {tmp_path}: ")


# -- folders of images


def image_folder(root: Path, parts: dict[str, dict[str, int]], suffix: str = ".png") -> None:
    """Write so many images for each class of each part, dark ones for the first class."""
    rng = np.random.default_rng(0)
    for part, classes in parts.items():
        for number, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                dark = min(100 * number, 200)
                pixels = rng.integers(dark, dark + 50, size=(20, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}{suffix}")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_image_folder(tmp_path: Path, held_out: str) -> None:
    image_folder(tmp_path, {"train": {"cat": 3, "dog": 2}, held_out: {"cat": 1, "dog": 2}})
    train, _, test, classes, *_ = load("image_folder", root=str(tmp_path), image_size=14)
    assert (len(train), len(test), classes, train.shape) == (5, 3, 2, (3, 14, 14))
    images, labels = everything(test)
    assert labels.tolist() == [0, 1, 1]
    assert images[0].max() < images[1].min()


def test_images_are_seen_as_in_pytorchs_reference(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train": {"cat": 2}, "val": {"cat": 1}})
    train, _, test, _, *_ = load("image_folder", root=str(tmp_path))
    image = Image.open(tmp_path / "val" / "cat" / "0.png")
    reference = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    assert torch.allclose(everything(test)[0][0], reference(image), atol=1e-5)
    assert train.shape == (3, 224, 224)
    check_augmentation("image_folder", root=str(tmp_path))


def test_imagenet_constants_are_those_of_the_reference() -> None:
    mean, std = IMAGENET.preprocess.normalisation()
    assert torch.allclose(mean, torch.tensor([123.675, 116.28, 103.53]))
    assert torch.allclose(std, torch.tensor([58.395, 57.12, 57.375]))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "/train must hold a folder of images for each class"),
        ({"train": {"cat": 1}}, "/val must hold a folder of images for each class"),
        ({"train": {"cat": 1, "dog": 0}, "val": {"cat": 1}}, "no valid file for the classes dog"),
        ({"train": {"cat": 1, "dog": 1}, "val": {"cat": 1}}, "in one of them only: dog"),
        ({"train": {".": 1}, "val": {"cat": 1}}, "class folder"),
        (
            {"train": {f"c{i}": 1 for i in range(8)}, "val": {"cat": 1}},
            "only: c0, c1, c2, c3, c4 and 4 more",
        ),
    ],
)
def test_folders_that_will_not_do(tmp_path: Path, parts: dict[str, dict[str, int]], words: str) -> None:
    image_folder(tmp_path, parts)
    said = error_of("image_folder", root=str(tmp_path))
    assert words in said
    assert str(tmp_path) in said


def test_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path, {part: {f"n0{i}": 1 for i in range(4)} for part in ("train", "val")}, ".JPEG")
    said = error_of("imagenet", root=str(tmp_path))
    assert f"{tmp_path} has 4 class folders, ImageNet has 1000; set data.name to image_folder" in said
    monkeypatch.setattr(datasets, "IMAGENET_CLASSES", 4)
    train, _, test, classes, *_ = load("imagenet", root=str(tmp_path))
    assert (len(train), len(test), classes, train.shape) == (4, 4, 4, (3, 224, 224))
    assert everything(test)[1].tolist() == [0, 1, 2, 3]
