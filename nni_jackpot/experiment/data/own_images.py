"""Data sets of the user's own, which a function makes: ``data.loader: module:function``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.errors import DatasetNotFoundError, first_line
from nni_jackpot.experiment.data.datasets import Loaded
from nni_jackpot.experiment.data.images import Batch, Images, random_numbers, seed_of
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import register_dataset
from nni_jackpot.experiment.schema.plugins import function_named


class OwnImages(Images):
    """A map-style data set of pairs ``(image, label)``, whose images are float (C, H, W) of one shape.

    Parameters
    ----------
    dataset
        The data set. What it draws from PyTorch's global generator is a function of the batch.
    classes
        Number of classes.
    """

    def __init__(self, dataset: Any, classes: int) -> None:
        self._dataset, self._classes = dataset, classes
        count, (image, _) = len(dataset), self._item(0)
        labels = torch.zeros((), dtype=torch.int64).expand(count)  # known when an item is read
        super().__init__(labels, tuple(image.shape), torch.zeros(1), torch.ones(1))  # type: ignore[arg-type]

    def __getitems__(self, indices: Sequence[int]) -> Batch | DatasetNotFoundError:
        """Return a batch, or an error, as `Images` does."""
        try:
            with random_numbers(seed_of(torch.tensor(indices))):
                items = [self._item(index) for index in indices]
        except DatasetNotFoundError as error:
            return error
        for index, (image, _) in zip(indices, items, strict=True):
            if tuple(image.shape) != self.shape:
                return _error(f"item {index} has an image of {tuple(image.shape)}, item 0 of {self.shape}")
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def _item(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self._dataset[index]
            label = int(label)
        except Exception as error:  # of the user's code
            raise _error(f"item {index}: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            raise _error(f"item {index} is not a pair of a float tensor (C, H, W) and a label")
        if not 0 <= label < self._classes:
            raise _error(f"item {index} has the label {label}, allowed: 0 to {self._classes - 1}")
        return image.float(), label


def _error(said: str) -> DatasetNotFoundError:
    return DatasetNotFoundError(f"data.loader: {said}")


@register_dataset("own", by_function=True)
def _own(config: DataConfig) -> Loaded:
    """Load what ``data.loader`` returns: training data, test data and the number of classes."""
    assert config.loader is not None  # the config has checked it
    try:
        train, test, classes = function_named(config.loader)()
        images, held_out = (OwnImages(dataset, int(classes)) for dataset in (train, test))
    except DatasetNotFoundError:
        raise
    except Exception as error:  # of the user's code
        wanted = "it must return (training data, test data, number of classes), data with [] and len()"
        said = f"{config.loader}: {type(error).__name__}: {first_line(error)}; {wanted}"
        raise _error(said) from error
    return Loaded(images, images, held_out, int(classes))
