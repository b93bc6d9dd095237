"""Each method resumes bit for bit, and gives two processes the same masks."""

from __future__ import annotations

import gc
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import batches, loss_of, losses, masks_with, network
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nni_jackpot.masks import named_masks
from nni_jackpot.training import TRAINING_METHODS, SparseTraining, TrainingMethod

STEPS, EPOCHS = 12, 6
# So that each method changes masks within the few steps; others have no such settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "deep_r": {"l1": 0.1, "temperature": 0.01},
    "dsr": {"every": 2, "threshold": 0.05, "share": 0.1},
    "gradual": {"every": 2},
    "lt": {"rounds": 2},
    "obd": {"rounds": 3},
    "rigl": {"every": 2},
}


def method(name: str) -> TrainingMethod:
    return TRAINING_METHODS.find(name)(**SETTINGS.get(name, {}))


def begun(name: str, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a training that has begun, from a state of all its parts or from the start."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = SparseTraining(model, optimizer, masks_with(30, 7), method(name), losses(model), seed=3)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "training": training}
    for part, own in (state or {}).items():
        parts[part].load_state_dict(own)
    training.begin(STEPS, EPOCHS)
    return parts


def run(
    parts: Mapping[str, Any], start: int, end: int, model: nn.Module | None = None, share: int = 0
) -> int:
    """Take steps; return how many of them changed a mask. With a wrapped model, take a share of each batch."""
    changes, training = 0, parts["training"]
    for number in range(start, end):
        images, labels = batches()[number % 4]
        own = slice(None) if model is None else slice(share, None, 2)
        before = named_masks(training.finish())
        loss_of((images[own], labels[own]), model or parts["model"]).backward()
        parts["optimizer"].step()
        training.step()
        parts["optimizer"].zero_grad()
        after = named_masks(training.finish())
        changes += any(not torch.equal(before[mask], after[mask]) for mask in after)
        assert all((dict(parts["model"].named_parameters())[n][m == 0] == 0).all() for n, m in after.items())
    return changes


def tensors(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {**parts["model"].state_dict(), **{f"mask of {n}": m for n, m in masks_of(parts).items()}}


def masks_of(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    return named_masks(parts["training"].finish())


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_a_resumed_training_is_an_uninterrupted_one(name: str, stop: int) -> None:
    torch.manual_seed(0)
    whole = begun(name)
    changes = run(whole, 0, STEPS)
    assert (changes > 0) == (name not in ("snip", "grasp", "static"))  # whose masks are fixed

    torch.manual_seed(0)
    first = begun(name)
    run(first, 0, stop)
    file = io.BytesIO()
    torch.save({part: own.state_dict() for part, own in first.items()}, file)
    random = torch.get_rng_state()
    file.seek(0)
    second = begun(name, torch.load(file))
    torch.set_rng_state(random)
    run(second, stop, STEPS)
    after = tensors(second)
    assert all(torch.equal(value, after[key]) for key, value in tensors(whole).items())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for name in TRAINING_METHODS:
        torch.manual_seed(rank)  # methods draw by the training's seed
        parts = begun(name)
        run(parts, 0, STEPS, DistributedDataParallel(parts["model"]), rank)
        weights = {key: value.detach() for key, value in parts["model"].named_parameters()}
        torch.save((masks_of(parts), weights), Path(folder, f"{name}.{rank}"))
    gc.collect()  # wrapped models hold the process group
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with every method in two processes."""
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("name", TRAINING_METHODS)
def test_two_processes_have_the_same_masks_and_weights(name: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"{name}.{rank}") for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
