"""The data sets of the package: training and test images, and the number of classes.

Small data sets are read into memory and normalised by their training images. Image files are read during
training, cropped and normalised as the network wants them.
"""

from __future__ import annotations

import os
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import InterpolationMode, v2

from nni_jackpot.errors import DatasetNotFoundError, first_few
from nni_jackpot.experiment.data.idx import read_idx
from nni_jackpot.experiment.data.images import ImageFiles, Images, ImageTensors
from nni_jackpot.experiment.data.preprocess import IMAGENET
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import register_dataset
from nni_jackpot.experiment.schema.plugins import function_named

# The folder of Debian's package dataset-fashion-mnist.
FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
# The default root of the other data sets, and of downloads.
USUAL_ROOT = "data"

IMAGENET_CLASSES = 1000

Pair = tuple[Tensor, Tensor]


class Loaded(NamedTuple):
    """A loaded data set.

    Attributes
    ----------
    train
        Training images, augmented if the config asks for it.
    unvaried
        The same images without augmentation.
    test
        Test images.
    num_classes
        Number of classes; labels are 0 to ``num_classes - 1``.
    classes
        Names of the classes in the order of their labels; empty if there are none.
    """

    train: Images
    unvaried: Images
    test: Images
    num_classes: int
    classes: tuple[str, ...] = ()


# -- in memory


def in_memory(
    config: DataConfig, train: Pair, test: Pair, num_classes: int, max_shift: int, flip: bool = False
) -> Loaded:
    """Return a data set of images in memory, by default normalised by its training images.

    Parameters
    ----------
    config
        Image size, mean, deviation and augmentation.
    train, test
        Images, uint8 (N, C, S, S), and labels, int64 (N,).
    num_classes
        Number of classes.
    max_shift
        Largest shift in pixels of an augmented image.
    flip
        Whether augmentation mirrors images.
    """
    channels = [train[0][:, i].float() for i in range(train[0].shape[1])]
    mean = torch.stack([values.mean() for values in channels])
    std = torch.stack([values.std() for values in channels])
    if (preprocess := config.preprocess) is not None:
        given = preprocess.normalisation(len(channels))
        mean = mean if preprocess.mean is None else given[0]
        std = std if preprocess.std is None else given[1]
    size = config.image_size or train[0].shape[2]
    plain = ImageTensors(*train, mean, std, size)
    varied = ImageTensors(*train, mean, std, size, max_shift, flip) if config.augment else plain
    return Loaded(varied, plain, ImageTensors(*test, mean, std, size), num_classes)


@register_dataset("digits", classes=10, shape=(1, 8, 8), train_images=1437)
def _digits(config: DataConfig) -> Loaded:
    """Load scikit-learn's 1797 images of 8x8 pixels; the same fifth of each class is tested at every seed."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    classes = torch.from_numpy(labels).long()
    train, test = (
        torch.from_numpy(part)
        for part in train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    )
    return in_memory(config, (images[train], classes[train]), (images[test], classes[test]), 10, max_shift=1)


def _mnist(kind: type[MNIST], config: DataConfig) -> Loaded:
    """Load 60000 + 10000 images of 28x28 pixels from IDX files in ``root`` or torchvision's folder in it."""
    root = Path(config.root or USUAL_ROOT)
    remedy = "set data.root to the folder that holds them, or data.download to true"
    if kind is FashionMNIST and not config.download:
        root = Path(config.root or FASHION_MNIST_ROOT)
        remedy = f"install Debian's package (apt-get install dataset-fashion-mnist), {remedy}"
    if config.download:
        _download(kind, root)
    folders = root, root / kind.__name__ / "raw"
    names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    candidates = [[folder / f"{name}{end}" for folder in folders for end in (".gz", "")] for name in names]
    found = [next((path for path in paths if path.is_file()), None) for paths in candidates]
    missing = [f"{name}[.gz]" for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise DatasetNotFoundError(f"{root} lacks {', '.join(missing)} of {kind.__name__}: {remedy}")
    train_images, train_labels, test_images, test_labels = (path for path in found if path is not None)
    train, test = _read_pair(train_images, train_labels), _read_pair(test_images, test_labels)
    return in_memory(config, train, test, 10, max_shift=2)


for _name, _mnist_kind in (("mnist", MNIST), ("fashion_mnist", FashionMNIST)):
    register_dataset(_name, classes=10, shape=(1, 28, 28), train_images=60_000, downloadable=True)(
        partial(_mnist, _mnist_kind)
    )


def _read_pair(images_path: Path, labels_path: Path) -> Pair:
    images, labels = read_idx(images_path, (28, 28)), read_idx(labels_path, ())
    if len(images) != len(labels) or not len(labels):
        raise DatasetNotFoundError(
            f"{images_path} holds {len(images)} images, {labels_path} holds {len(labels)} labels: there must "
            "be as many, and at least one"
        )
    if labels.max() > 9:
        raise DatasetNotFoundError(f"{labels_path} holds the label {int(labels.max())}, allowed: 0 to 9")
    return images[:, None], labels.long()


def _cifar(kind: type[CIFAR10], config: DataConfig) -> Loaded:
    """Load 50000 + 10000 RGB images of 32x32 pixels from pickles, whose checksums torchvision knows."""
    root = Path(config.root or USUAL_ROOT)
    if config.download:
        _download(kind, root)
    folder = root / kind.base_folder
    checksums = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    bad = [
        f"{name} ({'damaged' if (folder / name).exists() else 'missing'})"
        for name, md5 in checksums.items()
        if not check_integrity(folder / name, md5)
    ]
    if bad:
        raise DatasetNotFoundError(
            f"{folder} is not {kind.__name__} as published: {', '.join(bad)}; set data.root to the folder "
            f"that holds {kind.base_folder}, or data.download to true"
        )
    train, test = kind(root, train=True), kind(root, train=False)
    return in_memory(config, _tensors(train), _tensors(test), len(train.classes), max_shift=4, flip=True)


for _name, _cifar_kind, _classes in (("cifar10", CIFAR10, 10), ("cifar100", CIFAR100, 100)):
    register_dataset(_name, classes=_classes, shape=(3, 32, 32), train_images=50_000, downloadable=True)(
        partial(_cifar, _cifar_kind)
    )


def _tensors(cifar: CIFAR10) -> Pair:
    return torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(cifar.targets)


def _download(kind: type[MNIST] | type[CIFAR10], root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Parallel trials need the same files: one downloads, the others wait.
        with FileLock(root / f"{kind.__name__}.lock"):
            kind(root, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DatasetNotFoundError(f"{kind.__name__} cannot be downloaded into {root}: {reason}") from error


# -- in files


def _image_folder(config: DataConfig) -> Loaded:
    """Load the user's images: ``root/train/<class>/*``, and ``root/val`` or ``root/test`` likewise."""
    assert config.root is not None  # the config has checked it
    root = Path(config.root)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    train, test = _scan(root / "train"), _scan(held_out)
    if train.classes != test.classes:
        only = sorted({*train.classes} ^ {*test.classes})
        raise DatasetNotFoundError(
            f"{root / 'train'} and {held_out} must have the same class folders; in one of them only: "
            f"{first_few(only, 5, ', ')}"
        )
    parts = [([path for path, _ in folder.samples], torch.tensor(folder.targets)) for folder in (train, test)]
    if config.transform is not None:
        own = function_named(config.transform), None
        images, others = (ImageFiles(*part, torch.zeros(1), torch.ones(1), *own) for part in parts)
        return Loaded(images, images, others, len(train.classes), tuple(train.classes))
    size, preprocess = IMAGENET.with_given(config.image_size, config.preprocess)
    plain, shape = preprocess.transform(size), (3, size, size)
    images, others = (ImageFiles(*part, *preprocess.normalisation(), plain, shape) for part in parts)
    varied = images
    if config.augment:
        how = InterpolationMode(preprocess.interpolation or "bilinear")
        crop = v2.RandomResizedCrop(size, interpolation=how)
        varied = images.seen_through(v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    return Loaded(varied, images, others, len(train.classes), tuple(train.classes))


@register_dataset(
    "imagenet",
    classes=IMAGENET_CLASSES,
    shape=(3, 224, 224),
    train_images=1_281_167,
    root="the folder of imagenet's train and val",
    in_files=True,
)
def _imagenet(config: DataConfig) -> Loaded:
    """Load ImageNet-1K: ``root/train/<wnid>/*.JPEG`` and ``root/val/<wnid>/*.JPEG``."""
    loaded = _image_folder(config)
    if loaded.num_classes != IMAGENET_CLASSES:
        raise DatasetNotFoundError(
            f"{config.root} has {loaded.num_classes} class folders, ImageNet has {IMAGENET_CLASSES}; set "
            "data.name to image_folder for a part of it"
        )
    return loaded


def _scan(folder: Path) -> ImageFolder:
    try:
        for name in os.listdir(folder):
            _refuse_circles(folder / name)
        return ImageFolder(folder)
    except DatasetNotFoundError:
        raise
    except OSError as error:
        raise DatasetNotFoundError(
            f"{folder} must hold a folder of images for each class, {folder}/<class>/*: {error}"
        ) from error


def _refuse_circles(top: Path) -> None:
    """Refuse a folder that links lead to twice: its images would count several times, or without end."""
    seen: dict[tuple[int, int], str] = {}
    for name, _, _ in os.walk(top, followlinks=True):
        status = os.stat(name)
        first = seen.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            raise DatasetNotFoundError(
                f"{name} is {first} again, by a link: link to each folder of images once"
            )


register_dataset("image_folder", root="the folder of image_folder's train and val", in_files=True)(
    _image_folder
)
