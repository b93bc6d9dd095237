"""The logs of a run that was interrupted are those of one that was not."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from event_points import read_events
from interruption import stopping
from tiny_runs import write_file
from torch import nn

from nni_jackpot.errors import CheckpointError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.run import search
from nni_jackpot.experiment.tracking import Tracker

STEPS = 5  # an epoch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(
        tmp_path,
        data={"train_images": 64 * STEPS},
        pretrain={"epochs": 0},
        config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.8}],
        search={"epochs": 4, "checkpoint_every": 3},
        finetune={"epochs": 0, "under": "initial"},
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logs(folder: Path) -> tuple[list[dict[str, str]], dict[str, list[tuple[int, Any]]]]:
    """Return rows and points without the seconds, which differ."""
    found = [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]
    return found, read_events(folder / "tensorboard")


def interrupt(config: RunConfig, step: int) -> None:
    with stopping(at=step), pytest.raises(KeyboardInterrupt):
        search(config)


def dropping_model(config: Any, num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(512, num_classes)
    )


@pytest.mark.parametrize(
    ("step", "build"), [(4, build_model), (15, build_model), (20, build_model), (11, dropping_model)]
)
def test_a_resumed_search_has_the_logs_of_a_whole_one(
    step: int, build: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nni_jackpot.experiment.running.context.build_model", build)
    every = {"search.checkpoint_every": 5} if step == 15 else {}  # at the end of an epoch
    search(load_config(path, {**every, "output": str(tmp_path / "whole")}))
    config = load_config(path, every)
    interrupt(config, step)
    result = search(config)
    assert result.resumed_step == (step if every or step == 20 else step // 3 * 3)
    assert logs(tmp_path / "out") == logs(tmp_path / "whole")
    seconds = [float(row["seconds"]) for row in rows(tmp_path / "out")]
    assert seconds == sorted(seconds)
    assert len(os.listdir(tmp_path / "out" / "tensorboard")) == 1


def test_a_search_that_is_interrupted_again_and_again(path: Path, tmp_path: Path) -> None:
    search(load_config(path, {"output": str(tmp_path / "whole")}))
    config = load_config(path)
    for step in (4, 4, 4, 4):  # of those that each process takes
        interrupt(config, step)
    search(config)
    assert logs(tmp_path / "out") == logs(tmp_path / "whole")


def test_a_checkpoint_without_a_state_of_the_log(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    interrupt(config, 7)
    file = tmp_path / "out" / "checkpoint.pth"
    saved = torch.load(file, weights_only=True)
    for beside in ({"step": 6}, [1], {"step": "6", "epoch_steps": 1, "loss_sum": 1.0, "seconds": 1.0}):
        torch.save({**saved, "beside": beside}, file)
        with pytest.raises(CheckpointError, match="state of a tracker"):
            search(config)
    del saved["beside"]  # of an earlier version
    torch.save(saved, file)
    assert search(config).resumed_step == 6
    assert [row["loss"] == "" for row in rows(tmp_path / "out")] == [False, True, False, False]


def test_a_loss_that_was_noted_is_counted_once(tmp_path: Path) -> None:
    with Tracker(tmp_path, 2, description="search") as tracker:
        tracker.note(torch.tensor(2.0))
        assert tracker.state_dict()["loss_sum"] == 2.0
        assert tracker.state_dict()["step"] == 1
        tracker.step(torch.tensor(2.0))
        tracker.step(4.0)
        tracker.epoch(0.5)
    assert rows(tmp_path)[0]["loss"] == "3.0"
