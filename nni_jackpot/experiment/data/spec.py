"""The registry of data sets: names, sizes and loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nni_jackpot.runtime.registry import Registry


@dataclass(frozen=True)
class DatasetSpec:
    """A data set, and its properties that are known before any file is read.

    Attributes
    ----------
    load
        Returns `nni_jackpot.experiment.data.datasets.Loaded` for a `DataConfig`.
    classes
        Number of classes; None if the files decide.
    shape
        Channels, height and width of an image; None if the files decide.
    train_images
        Number of training images; None if the files decide.
    downloadable
        Whether ``load`` can download the files.
    root
        What ``data.root`` must name, if the data set has no usual place; empty if it has one.
    is_text
        Whether the data set is text: ``load`` then returns its paragraphs.
    in_files
        Whether images are files, which are resized, cropped and normalised as the network wants them.
    by_function
        Whether ``data.loader`` names the function that makes the data set.
    """

    load: Callable[..., Any]
    classes: int | None = None
    shape: tuple[int, int, int] | None = None
    train_images: int | None = None
    downloadable: bool = False
    root: str = ""
    is_text: bool = False
    in_files: bool = False
    by_function: bool = False

    @property
    def size(self) -> tuple[int, tuple[int, int, int], int] | None:
        """Training images, shape and classes; None if the files decide about one of them."""
        if self.train_images is None or self.shape is None or self.classes is None:
            return None
        return self.train_images, self.shape, self.classes


DATASETS: Registry[DatasetSpec] = Registry("data set")


def register_dataset(name: str, **known: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers the loader of a data set under a name.

    Parameters
    ----------
    name
        The name, an identifier.
    **known
        Properties that are known before any file is read: the other fields of `DatasetSpec`.

    Raises
    ------
    ValueError
        If the name is not an identifier, or belongs to another data set.
    """

    def decorate(load: Callable[..., Any]) -> Callable[..., Any]:
        DATASETS.register(name, source=load)(DatasetSpec(load, **known))
        return load

    return decorate
