"""A dataset as loaders of batches, in an order that a resumed run has again."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from nni_jackpot.errors import DatasetNotFoundError, ExperimentConfigError
from nni_jackpot.experiment.data.images import Batch, Images
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.runtime.distributed import rank, world_size

# One batch of so many is in the sample that norm statistics are estimated by in the midst of a search, and
# at least so many are.
_SAMPLE, _AT_LEAST = 16, 4


@dataclass(frozen=True)
class Data:
    """A dataset ready for training.

    Attributes
    ----------
    train, test
        Loaders of batches ``(images, labels)``: float32 (N, C, S, S), normalised, and int64 (N,).
    sample
        The first few batches of training, the same at every pass.
    num_classes
        Labels are 0 to ``num_classes - 1``.
    shape
        Of an image: channels, height and width.
    """

    train: TrainLoader
    test: Loader
    sample: Loader
    num_classes: int
    shape: tuple[int, int, int]

    def restart(self) -> None:
        """Begin the sequence of training epochs anew, as if just loaded."""
        self.train.order.epoch = 0
        self.train.pass_over(0)


def load_data(config: DataConfig, seed: int) -> Data:
    """Load a dataset.

    Parameters
    ----------
    config
        The dataset and its batches.
    seed
        Fixes the order of the training images, and with it how they are varied: two loaders of one seed give
        the same sequence of epochs, each in an order of its own. PyTorch's global generator is left alone.

    Raises
    ------
    DatasetNotFoundError
        If files of the dataset are missing or damaged; the loaders raise it as well, for image files.
    ExperimentConfigError
        If fewer training images are there than the config wants, or batches cannot be dealt out to the
        processes of the run.
    """
    try:
        train, unvaried, test, num_classes = DATASETS.find(config.name).load(config)
    except DatasetNotFoundError:
        raise
    except OSError as error:  # a name that is too long, a link that leads to itself
        raise DatasetNotFoundError(f"{config.name} cannot be read from {config.root}: {error}") from error
    part, parts = rank(), world_size()
    if config.batch_size % parts or config.batch_size < 2 * parts:
        raise ExperimentConfigError(
            f"data.batch_size: found {config.batch_size}, allowed for {parts} processes: multiples of "
            f"{parts}, from {2 * parts}"
        )
    used, kept_aside = used_images(config, len(train))
    tested, in_order = (unvaried, kept_aside) if config.validation_images else (test, range(len(test)))
    starts = range(0, len(in_order), config.eval_batch_size)
    blocks = [in_order[start : start + config.eval_batch_size][part::parts] for start in starts]
    order = EpochShuffle(used, config.batch_size, seed, part, parts)
    first = list(islice(order, max(_AT_LEAST, len(order) // _SAMPLE)))
    order.epoch = 0
    return Data(
        train=TrainLoader(train, order, config.workers, seed),
        test=Loader(tested, list(filter(len, blocks)), config.workers, seed),
        sample=Loader(train, first, config.workers, seed),
        num_classes=num_classes,
        shape=train.shape,
    )


def used_images(config: DataConfig, there: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return which training images are trained on, and which are kept aside, out of all that are there.

    Raises
    ------
    ExperimentConfigError
        If fewer are there than the config wants.
    """
    if config.train_images is None and config.validation_images is None:
        return range(there), range(0)
    aside = config.validation_images or 0
    if aside > there - 2:
        raise ExperimentConfigError(
            f"data.validation_images: found {aside}, allowed: null or 1 to {there - 2}"
        )
    wanted = there - aside if config.train_images is None else config.train_images
    if wanted > there - aside:
        rest = f", of {there} less data.validation_images" if aside else ""
        raise ExperimentConfigError(
            f"data.train_images: found {wanted}, allowed: null or 2 to {there - aside}{rest}"
        )
    # In random order, for files often come sorted by class; of a seed that is nobody's, for runs of several
    # seeds are to differ in their training, not in their data.
    order = np.random.default_rng(0).permutation(there).tolist()
    return order[:wanted], order[there - aside :]


class EpochShuffle(Sampler[list[int]]):
    """Batches of indices in an order that is a function of (seed, epoch).

    Parameters
    ----------
    indices
        Those of the images to go through.
    batch_size
        Images per batch, a multiple of ``parts``. The last batch may be smaller, but is left out if it has
        not two images for each part: batch norm cannot normalise over one, once the feature maps are down to
        one pixel.
    seed
        Non-negative.
    part, parts
        Each batch is dealt out in so many parts of the same size, of which this one is taken.

    Attributes
    ----------
    epoch
        Number of the next epoch, from 0.
    first
        Number of the batch that the next epoch begins with, the ones before being left out.
    sizes
        Images in each batch of an epoch, of this part.
    """

    def __init__(
        self, indices: Sequence[int], batch_size: int, seed: int, part: int = 0, parts: int = 1
    ) -> None:
        self.epoch = 0
        self.first = 0
        whole, left = divmod(len(indices), batch_size)
        self.sizes = [batch_size // parts] * whole
        if left >= 2 * parts:
            self.sizes.append(left // parts)
        self._part = slice(part, None, parts)
        self._parts = parts
        self._indices = np.asarray(indices)
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._indices)
        first, self.first = self.first, 0
        self.epoch += 1
        for number, size in enumerate(self.sizes[first:], first):
            start = number * self._batch_size
            yield order[start : start + size * self._parts][self._part].tolist()


class Loader(DataLoader[Any]):
    """Batches of images, made by worker processes that stay from epoch to epoch.

    Parameters
    ----------
    images
        What is loaded.
    batches
        Indices of each batch.
    workers
        Number of processes, 0 for this one. The batches are the same.
    seed
        Keeps the loader from drawing numbers from PyTorch's global generator.
    """

    def __init__(
        self,
        images: Images,
        batches: Sequence[Sequence[int]] | Sampler[list[int]],
        workers: int,
        seed: int,
    ) -> None:
        super().__init__(
            images,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable with a length will do
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interruptions_to_the_run,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DatasetNotFoundError):
                raise batch
            yield batch


class TrainLoader(Loader):
    """Batches in an order that is another in each epoch, of which some can be passed over.

    Attributes
    ----------
    order
        Says which images come when.
    """

    def __init__(self, images: Images, order: EpochShuffle, workers: int, seed: int) -> None:
        super().__init__(images, order, workers, seed)
        self.order = order
        self._images = images
        self._passed_over = 0

    def pass_over(self, batches: int) -> None:
        """Have blank images stand in for the next so many batches, in this epoch and those that follow.

        They have the right shapes, and cost nothing to load: they are for a run that was interrupted and goes
        through its steps again, without doing their work, to where it was.
        """
        self._passed_over = batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        blanks = min(self._passed_over, len(self))
        self._passed_over -= blanks
        for size in self.order.sizes[:blanks]:
            yield self._images.blank(size)
        self.order.first = blanks
        yield from super().__iter__()


def _leave_interruptions_to_the_run(worker: int) -> None:
    """Have Ctrl-C, which all processes of a terminal get, not stop a worker, whose loader the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
