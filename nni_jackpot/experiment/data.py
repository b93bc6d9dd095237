"""Datasets as loaders of normalised batches.

A dataset is an entry of `DATASETS`. Those that fit into memory are `ImageTensors`, which hand over a whole
batch at once; any other map-style dataset, such as torchvision's, goes through PyTorch's own collation.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from nni_jackpot.errors import DatasetNotFoundError
from nni_jackpot.experiment.config import DataConfig

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"


@dataclass(frozen=True)
class DatasetSpec:
    """What a model must know of a dataset: classes, channels, and height = width in pixels."""

    num_classes: int
    in_channels: int
    image_size: int


@dataclass(frozen=True)
class Data:
    """A dataset ready for training.

    Attributes
    ----------
    train, test
        Loaders of batches ``(images, labels)``: float32 (N, in_channels, image_size, image_size), normalised
        by mean and standard deviation of the training images, and int64 (N,).
    num_classes
        Labels are 0 to ``num_classes - 1``.
    in_channels
        Channels of an image.
    image_size
        Height and width of an image, in pixels.
    """

    train: DataLoader[Any]
    test: DataLoader[Any]
    num_classes: int
    in_channels: int
    image_size: int

    def restart(self) -> None:
        """Begin the sequence of training epochs anew, as if just loaded."""
        self.train.batch_sampler.epoch = 0  # type: ignore[union-attr]


def load_data(config: DataConfig, seed: int) -> Data:
    """Load a dataset.

    Parameters
    ----------
    config
        The dataset and its batches.
    seed
        Fixes the order of the training images, and with it their random shifts: two loaders of one seed give
        the same sequence of epochs, each in an order of its own. PyTorch's global generator is left alone.

    Raises
    ------
    DatasetNotFoundError
        If files of the dataset are missing or damaged.
    """
    train, test, spec = DATASETS[config.name](config)
    order = EpochShuffle(len(train), config.batch_size, seed)  # type: ignore[arg-type]
    in_order = range(len(test))  # type: ignore[arg-type]
    blocks = [in_order[i : i + config.eval_batch_size] for i in in_order[:: config.eval_batch_size]]
    return Data(
        train=_loader(train, order, config.workers, seed),
        test=_loader(test, blocks, config.workers, seed),
        num_classes=spec.num_classes,
        in_channels=spec.in_channels,
        image_size=spec.image_size,
    )


def _loader(dataset: Dataset[Any], batches: Any, workers: int, seed: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        # ImageTensors hand over whole batches: collating them sample by sample would take most of the time.
        collate_fn=_as_it_is if isinstance(dataset, ImageTensors) else None,
        pin_memory=torch.cuda.is_available(),
        # Without its own, each pass would draw a number from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class EpochShuffle(Sampler[list[int]]):
    """Batches of indices in an order that is a function of (seed, epoch).

    Parameters
    ----------
    size
        Number of images.
    batch_size
        Images per batch. The last batch may be smaller, but a single image left over is dropped: batch norm
        cannot normalise over it once the feature maps are down to one pixel.
    seed
        Non-negative.

    Attributes
    ----------
    epoch
        Number of the next epoch, from 0.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.epoch = 0
        self._size = size
        self._used = size - 1 if size % batch_size == 1 else size
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return math.ceil(self._used / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._size)[: self._used]
        self.epoch += 1
        for start in range(0, self._used, self._batch_size):
            yield order[start : start + self._batch_size].tolist()


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, normalised and augmented a batch at a time.

    Parameters
    ----------
    images
        uint8 (N, C, H, W).
    labels
        int64 (N,).
    mean, std
        float32 (1, C, 1, 1), in units of the images' values.
    max_shift
        Images are shifted by up to so many pixels each way, 0 (black) coming in.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, max_shift: int = 0) -> None:
        self._images = images
        self._labels = labels
        self._mean = mean
        self._std = std
        self._max_shift = max_shift

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch ``(images, labels)``: float32 (N, C, H, W) and int64 (N,)."""
        at = torch.tensor(indices)
        images = self._images[at]
        if self._max_shift:
            # Seeded by the batch itself, whose order follows (seed, epoch): the same in every worker process.
            generator = torch.Generator().manual_seed(zlib.crc32(at.numpy().tobytes()))
            images = _shifted(images, self._max_shift, generator)
        return (images.float() - self._mean) / self._std, self._labels[at]


def _shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image of (N, C, H, W) by its own whole number of pixels, 0 coming in."""
    n, channels, height, width = images.shape
    offsets = torch.randint(2 * max_shift + 1, (2, n, 1), generator=generator)
    rows = torch.arange(height) + offsets[0]
    columns = torch.arange(width) + offsets[1]
    return F.pad(images, [max_shift] * 4)[
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


Loaded = tuple[Dataset[Any], Dataset[Any], DatasetSpec]


def _in_memory(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, max_shift: int
) -> Loaded:
    """Make datasets of uint8 (N, C, S, S) images and their labels, both normalised as the training images."""
    values = train[0].float()
    mean = values.mean((0, 2, 3), keepdim=True)
    std = values.std((0, 2, 3), keepdim=True)
    spec = DatasetSpec(num_classes, train[0].shape[1], train[0].shape[2])
    return ImageTensors(*train, mean, std, max_shift), ImageTensors(*test, mean, std), spec


def _digits(config: DataConfig) -> Loaded:
    """Scikit-learn's 1797 images of 8x8 pixels; the same fifth of each class is the test at every seed."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    classes = torch.from_numpy(labels).long()
    train, test = (
        torch.from_numpy(part)
        for part in train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    )
    shift = 1 if config.augment else 0
    return _in_memory((images[train], classes[train]), (images[test], classes[test]), 10, shift)


def _fashion_mnist(config: DataConfig) -> Loaded:
    """60000 + 10000 images of 28x28 pixels, from the four IDX files of the dataset."""
    root = Path(config.root or FASHION_MNIST_ROOT)
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    found = [next((p for p in (root / f"{n}.gz", root / n) if p.is_file()), None) for n in names]
    missing = [f"{name}[.gz]" for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise DatasetNotFoundError(
            f"{root} lacks {', '.join(missing)} of Fashion-MNIST: install Debian's package "
            "(apt-get install dataset-fashion-mnist), or set data.root to the folder that holds them"
        )
    train_images, train_labels, test_images, test_labels = (path for path in found if path is not None)
    train, test = _read_pair(train_images, train_labels), _read_pair(test_images, test_labels)
    return _in_memory(train, test, 10, 2 if config.augment else 0)


def _read_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, (28, 28)), read_idx(labels_path, ())
    if len(images) != len(labels) or not len(labels):
        raise DatasetNotFoundError(
            f"{images_path} holds {len(images)} images, {labels_path} holds {len(labels)} labels: there must "
            "be as many, and at least one"
        )
    if labels.max() > 9:
        raise DatasetNotFoundError(f"{labels_path} holds the label {int(labels.max())}, allowed: 0 to 9")
    return images[:, None], labels.long()


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


DATASETS: dict[str, Callable[[DataConfig], Loaded]] = {"digits": _digits, "fashion_mnist": _fashion_mnist}
