"""Labelled images as normalised batches with random augmentation: in memory, and in files."""

from __future__ import annotations

import copy
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from nni_jackpot.errors import DatasetNotFoundError, first_line

Batch = tuple[Tensor, Tensor]

# Largest ratio of the sides: the shorter side is resized to hundreds of pixels, and a longer one would need
# gigabytes.
_MOST_STRETCHED = 50


class Images(Dataset[Any]):
    """Images that are loaded a batch at a time.

    The random numbers of a batch are a function of the batch itself, whose order follows (seed, epoch): they
    are the same for any number of worker processes, and after a resume.

    Parameters
    ----------
    labels
        int64 (N,).
    shape
        (C, H, W) of an image in a batch.
    mean, std
        float32 (C,), in units of the images' values, 0 to 255.
    """

    def __init__(self, labels: Tensor, shape: tuple[int, int, int], mean: Tensor, std: Tensor) -> None:
        self.labels = labels
        self.shape = shape
        self._mean = mean.view(1, -1, 1, 1)
        self._std = std.view(1, -1, 1, 1)

    @property
    def normalisation(self) -> dict[str, list[float]]:
        """Mean and deviation of each channel, for images whose values are from 0 to 1."""
        both = {"mean": self._mean, "std": self._std}
        return {name: (values.flatten() / 255).tolist() for name, values in both.items()}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch | DatasetNotFoundError:
        """Return a batch ``(images, labels)``: float32 (N, C, H, W) and int64 (N,).

        An error is returned, not raised: an error raised in a worker process arrives as a traceback.
        """
        at = torch.tensor(indices)
        try:
            pixels = self._pixels(at, seed_of(at))
        except DatasetNotFoundError as error:
            return error
        return (pixels.float() - self._mean) / self._std, self.labels[at]

    def blank(self, size: int) -> Batch:
        """Return a batch of zeros with the right shapes and types, which takes no memory."""
        return torch.zeros(()).expand(size, *self.shape), torch.zeros((), dtype=torch.int64).expand(size)

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        """Return the images at int64 (N,) as (N, C, H, W), augmented by random numbers of the seed."""
        raise NotImplementedError


def seed_of(at: Tensor) -> int:
    """Return the seed of the random numbers of a batch, from its indices, int64 (N,)."""
    return zlib.crc32(at.numpy().tobytes())


@contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generator for the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class ImageTensors(Images):
    """Images in memory.

    Parameters
    ----------
    images
        uint8 (N, C, S, S).
    labels, mean, std
        As for `Images`.
    size
        Final height and width of the images.
    max_shift
        Largest shift in pixels in each direction, filled with 0 (black): a crop of the padded image.
    flip
        Whether an image is mirrored left to right with probability 1/2.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        size: int,
        max_shift: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(labels, (images.shape[1], size, size), mean, std)
        self._images = images
        self._size = size
        self._max_shift = max_shift
        self._flip = flip

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        images = self._images[at]
        generator = torch.Generator().manual_seed(seed)
        if self._max_shift:
            images = _shifted(images, self._max_shift, generator)
        if self._flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        if images.shape[3] != self._size:
            images = v2.functional.resize(images, [self._size, self._size], antialias=True)
        return images


def _shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image of (N, C, H, W) by its own whole number of pixels, filling with 0."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * max_shift + 1, (2, n), generator=generator)
    # A view of all crops (N, C, 2 * max_shift + 1, 2 * max_shift + 1, H, W), one per image is copied.
    crops = F.pad(images, [max_shift] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(n), :, top, left]


class ImageFiles(Images):
    """Images in files, read on demand, in three channels.

    Parameters
    ----------
    paths
        N files.
    labels, mean, std
        As for `Images`.
    transform
        Maps a PIL image in RGB to a tensor of the shape. Its random numbers come from PyTorch's global
        generator, which is restored afterwards.
    shape
        (C, H, W) of an image in a batch; None for what the transform makes of the first image.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        transform: Callable[[Any], Tensor],
        shape: tuple[int, int, int] | None,
    ) -> None:
        # One array: reference counts would make worker processes copy a list of a million strings.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._transform = transform
        if shape is None:
            with random_numbers(0):
                channels, height, width = self._transformed(0).shape
            shape = channels, height, width
        super().__init__(labels, shape, mean, std)

    def seen_through(self, transform: Callable[[Any], Tensor]) -> ImageFiles:
        """Return the same images with another transform."""
        others = copy.copy(self)
        others._transform = transform
        return others

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        with random_numbers(seed):
            return torch.stack([self._checked(i, self._transformed(i)) for i in at.tolist()])

    def _transformed(self, index: int) -> Any:
        image = self._read(index)
        try:
            pixels = self._transform(image)
        except Exception as error:  # of the user's code
            said = f"{type(error).__name__}: {first_line(error)}"
            raise DatasetNotFoundError(f"{self._path(index)} cannot be transformed: {said}") from error
        if not isinstance(pixels, Tensor) or pixels.ndim != 3:
            found = f"{type(pixels).__name__} {tuple(getattr(pixels, 'shape', ()))}"
            raise DatasetNotFoundError(
                f"{self._path(index)} is transformed to {found}, not to a tensor (C, H, W)"
            )
        return pixels

    def _checked(self, index: int, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape) != self.shape:
            raise DatasetNotFoundError(
                f"{self._path(index)} is transformed to {tuple(pixels.shape)}, other images to "
                f"{self.shape}: all must have one shape"
            )
        return pixels

    def _path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def _read(self, index: int) -> Any:
        path = self._path(index)
        try:
            if not os.path.isfile(path):  # opening a pipe may block forever
                raise ValueError("it is not a file")
            with warnings.catch_warnings(), open(path, "rb") as file:
                warnings.simplefilter("ignore")  # each worker process would print them
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file)
                if image.format == "EPS":
                    raise ValueError("it is a program, which Ghostscript would run")
                if max(image.size) > _MOST_STRETCHED * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
                return image.convert("RGB")
        except Exception as error:  # PIL's readers raise various errors for damaged files
            raise DatasetNotFoundError(f"{path} cannot be read as an image: {error}") from error
