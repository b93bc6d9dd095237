"""The dependencies of a checkpoint become plain data, and manipulated files are refused."""

from __future__ import annotations

import datetime
import logging
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import CheckpointError
from nni_jackpot.runtime.files import load_tensors
from nni_jackpot.runtime.plain import as_plain


class Colour(Enum):
    RED = 1


class Level(IntEnum):
    LOW = 3


@dataclass
class Wishes:
    rate: float
    colours: list[Colour]


VALUES: list[tuple[Any, Any]] = [
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.int64(8), 8),
    (np.bool_(True), True),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.str_("a"), "a"),
    (PurePosixPath("a/b"), "a/b"),
    (Colour.RED, "Colour.RED"),
    (Level.LOW, "Level.LOW"),
    (Decimal("0.10"), "0.10"),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    (Wishes(np.float64(0.1), [Colour.RED]), {"class": "Wishes", "rate": 0.1, "colours": ["Colour.RED"]}),
    (defaultdict(list, a=[np.int32(1)]), {"a": [1]}),
    (OrderedDict(b=(1, {2, 1})), {"b": (1, [1, 2])}),
    (torch.float16, "torch.float16"),
    (torch.device("cpu"), "cpu"),
    (range(3), "range(0, 3)"),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=lambda value: type(value).__name__)
def test_values_become_plain(value: Any, expected: Any, tmp_path: Path) -> None:
    found = as_plain(value, "it")
    assert found == expected
    assert type(found) is type(expected)
    torch.save(found, tmp_path / "it.pth")
    assert load_tensors(tmp_path / "it.pth", "test") == expected


@pytest.mark.parametrize(
    "value", [object(), len, [open], {"a": {1: object()}}, torch.nn.Linear(1, 1), Wishes]
)
def test_what_cannot_be_plain_is_refused_at_once(value: Any) -> None:
    pruner = LotteryJackpotPruner(ConvNet(), CONFIG_LIST)
    with pytest.raises(CheckpointError, match=r"settings\['mine'\].* is a .*which a checkpoint cannot hold"):
        pruner.checkpoint_to("search.pth", settings={"mine": value})


class Stop(Exception):
    pass


def interrupted(folder: Path, batches: Batches, stop_at: int | None, **options: Any) -> LotteryJackpotPruner:
    """Return a pruner with a checkpoint every second step, after an interrupted search."""
    torch.manual_seed(0)
    model, steps = ConvNet(), iter(range(100))

    def step(batch: Any, model: Any) -> torch.Tensor:
        if next(steps) == stop_at:
            raise Stop
        return training_step(batch, model)

    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches, step=step), **options)
    settings = {"path": folder, "rate": np.float64(0.1), "kinds": {Colour.RED}}
    pruner.checkpoint_to(folder / "search.pth", every=2, settings=settings)
    return pruner


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": EdgePopup(lr=np.float64(0.003), momentum=np.float32(0.5), ramp_end=np.float64(0.5))},
        {"optimizer": lambda scores: torch.optim.Adam(scores, lr=np.linspace(0.1, 0.2, 3)[0])},
        {"optimizer": lambda scores: torch.optim.SGD(scores, lr=torch.tensor(0.1))},
    ],
    ids=["as it comes", "NumPy's numbers", "NumPy's rate", "a tensor's rate"],
)
def test_a_reader_takes_what_its_writer_writes(options: dict, tmp_path: Path, batches: Batches) -> None:
    whole = interrupted(tmp_path / "whole", batches, None, **options).compress(np.int64(8), None)[1]
    with pytest.raises(Stop):
        interrupted(tmp_path, batches, 5, **options).compress(np.int64(8), None)
    again = interrupted(tmp_path, batches, None, **options)
    masks = again.compress(8, None)[1]
    assert again.resumed_step == 4
    assert all(torch.equal(masks[name]["weight"], whole[name]["weight"]) for name in whole)


def _drop(key: str) -> Any:
    return lambda saved: saved.pop(key)


def _set(value: Any, *keys: str) -> Any:
    def change(saved: dict) -> None:
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = value

    return change


KEYS = [
    *("losses", "may_skip", "clock", "rankings", "trained", "masks", "buffers", "optimizer", "driver"),
    *("random_start", "random", "sums", "format", "depends on"),
]
SCORE = "conv1._nni_wrapper.weight_score"


@pytest.mark.parametrize(
    "tamper",
    [
        *(pytest.param(_drop(key), id=f"no {key}") for key in KEYS),
        *(pytest.param(_set(None, key), id=f"{key} is None") for key in KEYS),
        pytest.param(_set(99, "format"), id="format of another version"),
        pytest.param(_set(-1, "clock", "step"), id="step"),
        pytest.param(_set("4", "clock", "step"), id="step of letters"),
        pytest.param(_set(10**30, "clock", "step"), id="step beyond the end"),
        pytest.param(_set(torch.ones(3), "trained", SCORE), id="score of another shape"),
        pytest.param(_set(torch.full((8, 1, 3, 3), torch.nan), "trained", SCORE), id="score of NaN"),
        pytest.param(_set("x", "trained", SCORE), id="score of letters"),
        pytest.param(_set({}, "masks"), id="no masks"),
        pytest.param(
            _set(torch.zeros(8, 1, 3, 3).bool(), "masks", "conv1.weight", "mask"), id="mask of zeros"
        ),
        pytest.param(_set(-3, "masks", "conv1.weight", "keep"), id="keeps less than nothing"),
        pytest.param(_set({}, "masks", "conv1.weight"), id="no mask"),
        pytest.param(_set({"no.such.module.weight": torch.ones(1)}, "buffers"), id="a buffer of nobody"),
        pytest.param(_set({}, "optimizer"), id="an optimizer without state"),
        pytest.param(_set([], "random"), id="no random states"),
        pytest.param(_set([{"torch": b"x"}], "random_start"), id="random states of letters"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(tamper: Any, tmp_path: Path, batches: Batches) -> None:
    with pytest.raises(Stop):
        interrupted(tmp_path, batches, 5).compress(8, None)
    path = tmp_path / "search.pth"
    saved = torch.load(path, weights_only=True)
    tamper(saved)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"search\.pth"):
        interrupted(tmp_path, batches, None).compress(8, None)


def test_a_resumed_search_says_that_sums_are_in_another_order(
    tmp_path: Path, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Stop):
        interrupted(tmp_path, batches, 5).compress(8, None)
    path = tmp_path / "search.pth"
    saved = torch.load(path, weights_only=True)
    saved["sums"]["threads"] += 1
    torch.save(saved, path)
    with caplog.at_level(logging.WARNING, "nni_jackpot"):
        interrupted(tmp_path, batches, None).compress(8, None)
    assert "sums in another order" in caplog.text


def test_a_checkpoint_is_written_when_much_time_has_passed(tmp_path: Path, batches: Batches) -> None:
    pruner = interrupted(tmp_path, batches, 3)
    pruner.checkpoint_to(tmp_path / "search.pth", every=1000, minutes=1e-9)
    with pytest.raises(Stop):
        pruner.compress(8, None)
    assert torch.load(tmp_path / "search.pth", weights_only=True)["clock"]["step"] == 3
    with pytest.raises(ValueError, match="minutes must be positive"):
        pruner.checkpoint_to(tmp_path / "search.pth", minutes=0)


# -- what is refused before the search


@pytest.mark.parametrize("length", [float("nan"), 8.0, "8", 0, -1, True, np.float64(8)])
@pytest.mark.parametrize("name", ["max_steps", "max_epochs"])
def test_a_length_is_a_positive_whole_number(name: str, length: Any, batches: Batches) -> None:
    model = ConvNet()
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches))
    with pytest.raises(ValueError, match=name):
        pruner.compress(**{name: length})


@pytest.mark.parametrize(
    "option",
    [
        *(
            {name: value}
            for name in ("lr", "momentum", "weight_decay")
            for value in (-1.0, np.nan, np.inf, 1e300)
        ),
        {"momentum": 1.0},
        {"pruned_score": -np.inf},
        {"pruned_score": np.nan},
        {"kept_score": np.inf},
        {"temperature": np.nan},
        {"ramp_end": np.nan},
        {"anneal_end": -0.1},
    ],
    ids=str,
)
def test_numbers_that_no_search_survives_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        EdgePopup(**option)


def test_a_state_of_another_budget_keeps_the_budget_that_was_asked_for(batches: Batches) -> None:
    torch.manual_seed(0)
    dense, sparse = ConvNet(), ConvNet()
    config = [{**CONFIG_LIST[0], "sparse_ratio": 0.3}]
    LotteryJackpotPruner(dense, config)
    pruner = LotteryJackpotPruner(sparse, CONFIG_LIST, make_evaluator(sparse, batches))
    sparse.load_state_dict(dense.state_dict())

    def zeros() -> dict[str, int]:
        return {name: int((mask["weight"] == 0).sum()) for name, mask in pruner.get_masks().items()}

    expected = {
        name: int(0.7 * getattr(sparse, name)._nni_wrapper.weight.numel()) for name in ("conv1", "conv2")
    }
    assert zeros() == expected
    pruner.compress(8, None)
    assert zeros() == expected
