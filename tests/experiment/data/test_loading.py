from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from nni_jackpot.errors import DatasetNotFoundError, ExperimentConfigError
from nni_jackpot.experiment.data.images import Images, ImageTensors
from nni_jackpot.experiment.data.loading import EpochShuffle, Loader, TrainLoader, load_data
from nni_jackpot.experiment.data.section import DataConfig

DIGITS = DataConfig(name="digits")


def epoch(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches() -> None:
    data = load_data(DIGITS, seed=0)
    assert (data.num_classes, data.shape) == (10, (1, 8, 8))
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert len(next(iter(data.test))[1]) == 360
    assert len(data.train) == len(list(data.train)) == 23
    assert (len(data.train.dataset), len(data.test.dataset)) == (1437, 360)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch_size", "batches"), [(64, 4), (8, 11), (1437, 1)])
def test_a_sample_is_of_the_first_batches(batch_size: int, batches: int) -> None:
    data = load_data(DataConfig(name="digits", batch_size=batch_size, augment=True), seed=0)
    first = [images for images, _ in itertools.islice(data.train, batches)]
    for _ in range(2):
        found = [images for images, _ in data.sample]
        assert len(found) == batches
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


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


def test_some_of_the_images_are_the_same_ones_at_every_seed() -> None:
    config = DataConfig(name="digits", train_images=100)
    loaders = [load_data(config, seed).train for seed in (0, 1)]
    epochs = [epoch(loader) for loader in loaders]
    assert [len(labels) for _, labels in epochs] == [100, 100]
    assert not torch.equal(epochs[0][1], epochs[1][1])  # in another order
    sums = [images.sum((1, 2, 3)).sort().values for images, _ in epochs]
    torch.testing.assert_close(*sums)
    assert len(epochs[0][1].unique()) == 10  # not the first ones, which files have sorted by class
    assert len(load_data(config, 0).test) == len(load_data(DIGITS, 0).test)


def test_more_images_than_there_are() -> None:
    with pytest.raises(ExperimentConfigError, match=r"data.train_images: found 1438, allowed.* 2 to 1437"):
        load_data(DataConfig(name="digits", train_images=1438), seed=0)


def test_validation_images_are_kept_aside() -> None:
    options: dict[str, Any] = {"name": "digits", "validation_images": 300, "augment": True}
    data = [load_data(DataConfig(**options), seed) for seed in (0, 1)]
    assert [(sum(part.train.order.sizes), len(part.test.dataset)) for part in data] == [(1137, 1437)] * 2  # type: ignore[arg-type]
    images, labels = epoch(data[0].test)
    assert len(labels) == 300
    assert torch.equal(images, epoch(data[1].test)[0])
    assert torch.equal(images, epoch(data[0].test)[0])  # as they are, whatever training does to its own
    whole = load_data(DataConfig(name="digits"), seed=0).train.dataset.__getitems__(range(1437))[0]  # type: ignore[attr-defined]
    kept = {image.numpy().tobytes() for image in images}
    trained = load_data(DataConfig(**{**options, "augment": False}), seed=0).train
    seen = {image.numpy().tobytes() for image in epoch(trained)[0]}
    assert not kept & seen
    assert kept | seen == {image.numpy().tobytes() for image in whole}
    fewer = load_data(DataConfig(**{**options, "augment": False, "train_images": 100}), seed=0)
    assert torch.equal(epoch(fewer.test)[0], images)
    assert {image.numpy().tobytes() for image in epoch(fewer.train)[0]} < seen


def test_more_validation_images_than_there_are() -> None:
    with pytest.raises(
        ExperimentConfigError, match=r"validation_images: found 1436, allowed: null or 1 to 1435"
    ):
        load_data(DataConfig(name="digits", validation_images=1436), seed=0)
    with pytest.raises(ExperimentConfigError, match=r"train_images: found 1400, .* 2 to 1337, of 1437 less"):
        load_data(DataConfig(name="digits", validation_images=100, train_images=1400), seed=0)


def test_each_epoch_has_an_order_of_its_own_and_all_images() -> None:
    loader = load_data(DIGITS, seed=0).train
    (_, first), (_, second) = epoch(loader), epoch(loader)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_each_seed_has_an_order_of_its_own() -> None:
    assert not torch.equal(epoch(load_data(DIGITS, 0).train)[1], epoch(load_data(DIGITS, 1).train)[1])


def test_epoch_can_be_chosen() -> None:
    first, second = EpochShuffle(range(20), 4, seed=0), EpochShuffle(range(20), 4, seed=0)
    list(first)
    second.epoch = 1
    assert list(first) == list(second)
    assert first.epoch == 2


@pytest.mark.parametrize(("size", "sizes"), [(12, [4, 4, 4]), (14, [4, 4, 4, 2]), (13, [4, 4, 4]), (3, [3])])
def test_last_batch_is_kept_unless_it_is_a_single_image(size: int, sizes: list[int]) -> None:
    order = EpochShuffle(range(size), 4, seed=0)
    batches = list(order)
    assert [len(batch) for batch in batches] == order.sizes == sizes
    assert len(order) == len(sizes)
    assert len({*chain(*batches)}) == sum(sizes)


def test_dropped_image_is_another_in_each_epoch() -> None:
    order = EpochShuffle(range(13), 4, seed=0)
    dropped = {(set(range(13)) - {*chain(*order)}).pop() for _ in range(10)}
    assert len(dropped) > 1


def test_first_batch_can_be_chosen_for_one_epoch() -> None:
    whole, rest = EpochShuffle(range(14), 4, seed=0), EpochShuffle(range(14), 4, seed=0)
    rest.first = 2
    assert list(rest) == list(whole)[2:]
    assert list(rest) == list(whole)


def test_global_generator_is_left_alone() -> None:
    loader = load_data(DataConfig(name="digits", augment=True), seed=0).train
    before = torch.get_rng_state()
    epoch(loader)
    assert torch.equal(before, torch.get_rng_state())


# -- worker processes


@pytest.mark.parametrize("augment", [False, True])
def test_workers_change_nothing(augment: bool) -> None:
    own, others = (
        load_data(DataConfig(name="digits", augment=augment, workers=workers), seed=0) for workers in (0, 2)
    )
    for _ in range(2):
        for a, b in zip(epoch(own.train), epoch(others.train), strict=True):
            assert torch.equal(a, b)
    for data in (own, others):
        next(iter(data.train))  # an epoch that is not finished
        data.restart()
    for a, b in zip(epoch(own.train), epoch(others.train), strict=True):
        assert torch.equal(a, b)


class Processes(Images):
    """Images whose pixels tell the process that made them."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8, dtype=torch.int64), (1, 1, 1), torch.zeros(1), torch.ones(1))

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return torch.full((len(at), 1, 1, 1), worker.seed % 2**20)


def test_workers_stay_from_epoch_to_epoch() -> None:
    loader = Loader(Processes(), [[0, 1], [2, 3]], workers=1, seed=0)
    assert torch.equal(epoch(loader)[0], epoch(loader)[0])


class Damaged(Images):
    def __init__(self) -> None:
        super().__init__(torch.zeros(8, dtype=torch.int64), (1, 1, 1), torch.zeros(1), torch.ones(1))

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        raise DatasetNotFoundError(f"image {int(at[0])} is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_out_of_a_worker(workers: int) -> None:
    with pytest.raises(DatasetNotFoundError) as caught:
        list(Loader(Damaged(), [[3]], workers, seed=0))
    assert str(caught.value) == "image 3 is damaged"


# -- going on after an interruption


class Counting(ImageTensors):
    """Images that count how often they are loaded."""

    def __init__(self) -> None:
        pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
        super().__init__(pixels, torch.arange(10), torch.zeros(1), torch.ones(1), size=1)
        self.loaded = 0

    def _pixels(self, at: Tensor, seed: int) -> Tensor:
        self.loaded += len(at)
        return super()._pixels(at, seed)


def batches(loader: TrainLoader, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        yield from loader


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("over", [0, 2, 3, 5, 9, 20])
def test_batches_are_passed_over(over: int, workers: int) -> None:
    whole = list(batches(TrainLoader(Counting(), EpochShuffle(range(10), 4, seed=0), 0, seed=0), 3))
    images = Counting()
    loader = TrainLoader(images, EpochShuffle(range(10), 4, seed=0), workers, seed=0)
    loader.pass_over(over)
    rest = list(batches(loader, 3))
    assert len(rest) == len(whole) == 9
    for number, (wanted, found) in enumerate(zip(whole, rest, strict=True)):
        for a, b in zip(wanted, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.equal(b, a if number >= over else torch.zeros_like(a))
    if not workers:
        assert images.loaded == sum(len(labels) for _, labels in whole[over:])


def test_a_restart_passes_over_nothing() -> None:
    data = load_data(DIGITS, seed=0)
    wanted = epoch(data.train)
    data.train.pass_over(100)
    data.restart()
    for a, b in zip(wanted, epoch(data.train), strict=True):
        assert torch.equal(a, b)
