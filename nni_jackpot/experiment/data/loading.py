"""A data set as loaders of batches, in an order that a resumed run repeats."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from nni_jackpot.errors import DatasetNotFoundError, ExperimentConfigError
from nni_jackpot.experiment.data.images import Images
from nni_jackpot.experiment.data.section import DataConfig, DataSection, TextConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.data.text import Sequences, split_text
from nni_jackpot.runtime.distributed import rank, world_size

# The sample that re-estimates norm statistics during a search: every n-th batch, and a minimum of batches.
_SAMPLE, _AT_LEAST = 16, 4


@dataclass(frozen=True)
class Data:
    """A data set ready for training.

    Attributes
    ----------
    train, test
        Loaders of batches ``(images, labels)``: float32 (N, C, S, S), normalised, and int64 (N,); of text,
        dicts of int64 (N, tokens).
    sample
        The first few training batches, the same in each pass.
    tested
        Number of test images, or of sequences, of all processes.
    num_classes
        Labels are 0 to ``num_classes - 1``; 0 for text.
    shape
        Channels, height and width of an image; for text the tokens of a sequence.
    classes
        Names of the classes in the order of their labels; empty if there are none.
    """

    train: TrainLoader
    test: Loader
    sample: Loader
    tested: int
    num_classes: int
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def restart(self) -> None:
        """Restart the sequence of training epochs."""
        self.train.order.epoch = 0
        self.train.pass_over(0)


def load_data(config: DataConfig, seed: int) -> Data:
    """Load a data set.

    Parameters
    ----------
    config
        The data set and its batches.
    seed
        Determines the order of the training images in each epoch, and their augmentation: loaders of one seed
        give the same sequence of epochs. PyTorch's global generator is not used.

    Raises
    ------
    DatasetNotFoundError
        If files of the data set are missing or damaged; for image files, the loaders raise it as well.
    ExperimentConfigError
        If the config asks for more training images than exist, or batches cannot be divided among the
        processes of the run.
    """
    loaded = _loaded(config)
    used, kept_aside = used_images(config, len(loaded.train))
    tested, in_order = (
        (loaded.unvaried, kept_aside) if config.validation_images else (loaded.test, range(len(loaded.test)))
    )
    found = _in_batches(config, seed, loaded.train, used, tested, in_order, loaded.num_classes)
    return replace(found, classes=loaded.classes)


def load_text(config: TextConfig, seed: int, tokenizer: Any, task: str) -> Data:
    """Load text as sequences of tokens.

    Parameters
    ----------
    config
        The text and its batches.
    seed
        As for `load_data`.
    tokenizer
        Of the network.
    task
        What the network computes (`nni_jackpot.experiment.models.language.TASKS`).

    Raises
    ------
    DatasetNotFoundError
        If there is no text.
    ExperimentConfigError
        As `load_data` does.
    """
    split = split_text(config, _loaded(config), tokenizer, task)
    return _in_batches(config, seed, split.sequences, split.train, split.sequences, split.test, 0)


def _loaded(config: DataSection) -> Any:
    try:
        return DATASETS.find(config.name).load(config)
    except DatasetNotFoundError:
        raise
    except OSError as error:  # a name that is too long, a link that leads to itself
        raise DatasetNotFoundError(f"{config.name} cannot be read from {config.root}: {error}") from error


def _in_batches(
    config: DataSection,
    seed: int,
    train: Images | Sequences,
    used: Sequence[int],
    tested: Images | Sequences,
    in_order: Sequence[int],
    num_classes: int,
) -> Data:
    part, parts = rank(), world_size()
    if config.batch_size % parts or config.batch_size < 2 * parts:
        raise ExperimentConfigError(
            f"data.batch_size: found {config.batch_size}, allowed for {parts} processes: multiples of "
            f"{parts}, from {2 * parts}"
        )
    starts = range(0, len(in_order), config.eval_batch_size)
    blocks = [in_order[start : start + config.eval_batch_size][part::parts] for start in starts]
    order = EpochShuffle(used, config.batch_size, seed, part, parts)
    first = list(islice(order, max(_AT_LEAST, len(order) // _SAMPLE)))
    order.epoch = 0
    return Data(
        train=TrainLoader(train, order, config.workers, seed),
        test=Loader(tested, list(filter(len, blocks)), config.workers, seed),
        sample=Loader(train, first, config.workers, seed),
        tested=len(in_order),
        num_classes=num_classes,
        shape=train.shape,
    )


def used_images(config: DataConfig, there: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the indices of the training images that are trained on, and of those set aside.

    Raises
    ------
    ExperimentConfigError
        If the config asks for more images than exist.
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
    # In random order, since files are often sorted by class; with a fixed seed, since runs of several seeds
    # must differ in their training, not in their data.
    order = np.random.default_rng(0).permutation(there).tolist()
    return order[:wanted], order[there - aside :]


class EpochShuffle(Sampler[list[int]]):
    """Batches of indices in an order that is a function of (seed, epoch).

    Parameters
    ----------
    indices
        Indices of the images of an epoch.
    batch_size
        Images per batch, a multiple of ``parts``. The last batch may be smaller; it is omitted if it has less
        than two images per part: batch norm cannot normalise one image with feature maps of one pixel.
    seed
        Non-negative.
    part, parts
        Each batch is divided into ``parts`` parts of equal size; this process takes one of them.

    Attributes
    ----------
    epoch
        Number of the next epoch, from 0.
    first
        Number of the first batch of the next epoch; earlier batches are skipped.
    sizes
        Images of this part in each batch of an epoch.
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
    """Batches of images, loaded by worker processes that persist over epochs.

    Parameters
    ----------
    images
        The images.
    batches
        Indices of each batch.
    workers
        Number of worker processes, 0 to load in this process. The batches are the same.
    seed
        Seed of the loader's generator; PyTorch's global generator is not used.
    """

    def __init__(
        self,
        images: Images | Sequences,
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

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DatasetNotFoundError):
                raise batch
            yield batch


class TrainLoader(Loader):
    """Batches in an order that differs in each epoch; batches can be skipped.

    Attributes
    ----------
    order
        The order of the images.
    """

    def __init__(self, images: Images | Sequences, order: EpochShuffle, workers: int, seed: int) -> None:
        super().__init__(images, order, workers, seed)
        self.order = order
        self._images = images
        self._passed_over = 0

    def pass_over(self, batches: int) -> None:
        """Replace the next batches by blank images, in this epoch and the following ones.

        Blank images have the right shapes, and need no loading. A resumed run uses them for the steps that
        were taken before the interruption.
        """
        self._passed_over = batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        blanks = min(self._passed_over, len(self))
        self._passed_over -= blanks
        for size in self.order.sizes[:blanks]:
            yield self._images.blank(size)
        self.order.first = blanks
        yield from super().__iter__()


def _leave_interruptions_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C in a worker: all processes of a terminal receive it, and the run stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
