from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import HELPERS, model_of
from interruption import stopping
from torch import nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_masks, mask_overlap
from nni_jackpot.errors import (
    CheckpointError,
    ConfigListError,
    DatasetNotFoundError,
    EmptyMatchError,
    JackpotError,
    OutputFolderError,
    SearchDivergedError,
)
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.data.images import ImageTensors
from nni_jackpot.experiment.data.loading import load_data
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.folder.pretrained import cache_path, load_weights
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.report import summary
from nni_jackpot.experiment.run import pretrain, search
from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.experiment.train import accuracy, train_weights
from nni_jackpot.masking.methods.edge_popup import EdgePopup

CPU = torch.device("cpu")


def test_search_end_to_end(config_file: Path, tmp_path: Path) -> None:
    config = load_config(
        config_file, {"search.reestimate_norm": False}
    )  # which would be after the last epoch
    result = search(config)
    rows = {row.kind: row for row in result.rows}
    assert list(rows) == ["dense", "initial", "initial_norm", "jackpot", "initial_tuned"]
    weights = sum(m.weight.numel() for m in model_of(config).modules() if isinstance(m, nn.Conv2d))
    assert rows["jackpot"].sparsity == int(0.8 * weights) / weights
    assert result.overlap < 1.0

    # What is on disk is the jackpot: the masks on the pre-trained weights, bit for bit, with adapted statistics.
    out = tmp_path / "out"
    masks = load_masks(out / "masks.pth")
    base, jackpot = model_of(config), model_of(config)
    load_weights(base, cache_path(config))
    load_weights(jackpot, out / "jackpot.pth")
    apply_masks(base, masks)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), jackpot.parameters(), strict=True))
    assert not torch.equal(base.bn1.running_mean, jackpot.bn1.running_mean)
    data = load_data(config.data, config.seed)
    assert accuracy(jackpot, data.test, CPU) == rows["jackpot"].accuracy
    assert mask_overlap(load_masks(out / "start.pth"), masks).total == result.overlap

    assert load_config(out / "config.yml") == config
    written = yaml.safe_load((out / "config.yml").read_text())["search"]
    assert (written["lr"], written["ramp_end"]) == (EdgePopup().lr, EdgePopup().ramp_end)
    assert json.loads((out / "results.json").read_text())["rows"][3]["accuracy"] == rows["jackpot"].accuracy
    with (out / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["epoch"] for line in lines] == ["1", "2"]
    assert float(lines[-1]["accuracy"]) == rows["jackpot"].accuracy
    assert {"loss", "learning_rate", "flips", "overlap", "seconds"} <= lines[0].keys()
    assert list((out / "tensorboard").iterdir())
    assert not list(tmp_path.rglob("*.part"))


def test_results_stay_when_another_config_comes(config_file: Path, tmp_path: Path) -> None:
    search(load_config(config_file, {"search.epochs": 0, "finetune.epochs": 0}))
    results = tmp_path / "out" / "results.json"
    pretrain(load_config(config_file, {"search.epochs": 0, "finetune.epochs": 0, "data.workers": 0}))
    assert results.exists()
    with pytest.raises(OutputFolderError, match=r"finished run of other settings: search\.epochs was 0"):
        pretrain(load_config(config_file, {"search.epochs": 1, "finetune.epochs": 0}))
    assert results.exists()


def test_no_epochs_of_search_leave_the_initial_mask(config_file: Path) -> None:
    result = search(load_config(config_file, {"search.epochs": 0, "finetune.epochs": 0}))
    assert result.overlap == 1.0
    assert result.rows[3].accuracy == result.rows[1].accuracy


def test_the_same_seed_gives_the_same_jackpot_cached_or_not(config_file: Path, tmp_path: Path) -> None:
    def masks(name: str, **overrides: Any) -> dict:
        overrides = {
            "output": str(tmp_path / name),
            "finetune.epochs": 0,
            "search.init": "random",
        } | overrides
        search(load_config(config_file, overrides))
        return load_masks(tmp_path / name / "masks.pth")

    first, cached = masks("a"), masks("b")
    trained_anew = masks("c", **{"pretrain.cache": str(tmp_path / "elsewhere")})
    assert mask_overlap(first, cached).total == 1.0
    assert mask_overlap(first, trained_anew).total == 1.0
    assert mask_overlap(first, masks("d", seed=1)).total < 1.0


def test_a_look_takes_no_samples_of_a_supermask(config_file: Path, tmp_path: Path) -> None:
    for anew in (False, True):
        overrides = {"search.method": "supermask", "search.reestimate_norm": anew, "finetune.epochs": 0}
        search(load_config(config_file, {**overrides, "output": str(tmp_path / str(anew))}))
    adapted, anew = (load_masks(tmp_path / name / "masks.pth") for name in ("False", "True"))
    assert mask_overlap(adapted, anew).total == 1.0


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ({"data.name": "fashion_mnist", "data.root": "/nowhere"}, DatasetNotFoundError),
        ({"config_list.0.op_types": ["Conv3d"]}, EmptyMatchError),
        ({"pretrain.checkpoint": "/nowhere.pth"}, CheckpointError),
        ({"device": "cuda:0"}, JackpotError),
        (
            {
                "config_list.0.internal_metric_block": 2,
                "config_list.0.exclude_op_names": ["conv1"],
                "search.recipe": "paper",
                "search.swap_limit": 0.1,
            },
            ConfigListError,
        ),
    ],
)
def test_mistakes_are_found_before_any_training(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict, error: type
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("nni_jackpot.experiment.running.context.train_weights", None)
    with pytest.raises(error):
        search(load_config(config_file, overrides))
    assert not (tmp_path / "pretrained").exists()
    assert not (tmp_path / "out" / "masks.pth").exists()


def test_unwritable_output(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for key in ("output", "pretrain.cache"):
        with pytest.raises(OutputFolderError):
            search(load_config(config_file, {key: str(tmp_path / "file" / "below")}))


def test_a_diverging_search_leaves_no_masks(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config)
    calls = []

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return model(batch[0]).sum() * (float("nan") if len(calls) == 5 else 1e-3)

    monkeypatch.setattr("nni_jackpot.experiment.running.image_task.cross_entropy_step", step)
    with pytest.raises(SearchDivergedError, match="at step 5 of the search"):
        search(config)
    assert not (tmp_path / "out" / "masks.pth").exists()


def test_tuned_weights_stay_under_the_mask(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(config)
    pruner = LotteryJackpotPruner(model, list(config.config_list))
    masks = pruner.get_masks()
    pruner.unwrap_model()
    data = load_data(config.data, 0)
    before = model.conv1.weight.detach().clone()
    file = EpochFile(tmp_path / "epoch.pth", {})
    nothing: Any = lambda *_: None  # noqa: E731
    train_weights(model, config.finetune, data.train, file, nothing, nothing, nothing, masks)
    mask = masks["conv1"]["weight"]
    assert (model.conv1.weight[mask == 0] == 0).all()
    assert not torch.equal(model.conv1.weight[mask == 1], before[mask == 1])


def test_summary_is_one_screen(config_file: Path, tmp_path: Path) -> None:
    results = [
        search(
            load_config(
                config_file, {"seed": seed, "finetune.epochs": 0, "output": str(tmp_path / f"s{seed}")}
            )
        )
        for seed in (0, 1)
    ]
    one, two = summary(results[:1], "magnitude"), summary(results, "magnitude")
    assert "±" not in one
    assert f"{100 * results[0].rows[0].accuracy:.2f}" in one
    mean = 50 * (results[0].rows[3].accuracy + results[1].rows[3].accuracy)
    assert f"{mean:.2f} ± " in two
    assert len(two.splitlines()) < 24


# -- an interrupted run


@pytest.fixture
def longer(config_file: Path) -> Path:
    content = yaml.safe_load(config_file.read_text())
    content["search"] |= {"epochs": 8, "checkpoint_every": 7}
    content["finetune"]["epochs"] = 0
    config_file.write_text(yaml.safe_dump(content))
    pretrain(load_config(config_file))
    return config_file


def metrics(folder: Path, *columns: str) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open() as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


@pytest.mark.honours("resume")
def test_the_same_command_goes_on_after_kill_9(longer: Path, tmp_path: Path) -> None:
    whole = search(load_config(longer, {"output": str(tmp_path / "whole")}))
    assert whole.resumed_step == 0
    last = random.randrange(7, 8 * 23)
    script = HELPERS / "interruption.py"
    killed = subprocess.run([sys.executable, str(script), str(longer), str(last)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = tmp_path / "out" / "checkpoint.pth"
    assert checkpoint.exists()
    result = search(load_config(longer))
    assert result.resumed_step == last // 7 * 7
    assert f"resumed at step {result.resumed_step}" in summary([result], "magnitude")
    assert result.rows == whole.rows
    assert result.overlap == whole.overlap
    for name in ("masks.pth", "jackpot.pth"):
        a, b = torch.load(whole.folder / name), torch.load(result.folder / name)
        assert _equal(a, b)
    columns = ("epoch", "step", "accuracy", "overlap", "learning_rate", "flips")
    assert metrics(result.folder, *columns) == metrics(whole.folder, *columns)
    assert not checkpoint.exists()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b is None or torch.equal(a, b)


def interrupt(config: RunConfig, step: int) -> None:
    """Run a search up to a step."""
    with stopping(at=step), pytest.raises(KeyboardInterrupt):
        search(config)


def dropping_model(config: Any, num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


@pytest.mark.parametrize("build", [build_model, dropping_model])
def test_what_an_interrupted_search_has_seen_is_not_loaded_again(
    longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    monkeypatch.setattr("nni_jackpot.experiment.running.context.build_model", build)
    loaded = 0
    load_pixels = ImageTensors._pixels

    def load(self: ImageTensors, at: torch.Tensor, seed: int) -> torch.Tensor:
        nonlocal loaded
        loaded += len(self) == 1437  # the training images
        return load_pixels(self, at, seed)

    options = {
        "data.augment": True,
        "search.reestimate_norm": False,
        "pretrain.cache": str(tmp_path / "other"),
    }
    config = load_config(longer, options)
    whole = search(load_config(longer, options | {"output": str(tmp_path / "whole")}))
    interrupt(config, 60)  # in the third epoch of 23 steps
    monkeypatch.setattr(ImageTensors, "_pixels", load)
    result = search(config)
    assert result.resumed_step == 56
    # The first epoch for the statistics of the initial mask; in the end two times four batches, by which the
    # last masks are compared with those of the start.
    assert loaded == 23 + 8 * 23 - 56 + 2 * 4
    assert result.rows == whole.rows
    assert _equal(torch.load(whole.folder / "masks.pth"), torch.load(result.folder / "masks.pth"))


def test_a_search_that_is_over_is_not_repeated(longer: Path, tmp_path: Path) -> None:
    options = {
        "finetune.epochs": 2,
        "search.ramp_end": 1.0,
    }  # the masks ramp to the end, and are then settled
    whole = search(load_config(longer, options | {"output": str(tmp_path / "whole")}))
    config = load_config(longer, options)
    interrupt(config, 8 * 23 + 10)  # in the tuning of weights
    rows = metrics(tmp_path / "out", "epoch", "accuracy", "seconds")
    result = search(config)
    assert result.resumed_step == 8 * 23
    assert result.rows == whole.rows
    assert _equal(torch.load(whole.folder / "jackpot.pth"), torch.load(result.folder / "jackpot.pth"))
    assert metrics(result.folder, "epoch", "accuracy", "seconds") == rows
    assert not (result.folder / "checkpoint.pth").exists()


@pytest.mark.parametrize("build", [build_model, dropping_model])
def test_training_of_weights_goes_on_after_its_last_epoch(
    longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    monkeypatch.setattr("nni_jackpot.experiment.running.context.build_model", build)
    options = {"data.augment": True, "pretrain.epochs": 4, "search.epochs": 1, "finetune.epochs": 3}
    caches = [{"pretrain.cache": str(tmp_path / name)} for name in ("one", "other")]
    whole = search(load_config(longer, options | caches[0] | {"output": str(tmp_path / "whole")}))
    config = load_config(longer, options | caches[1])
    interrupt(config, 2 * 23 + 5)  # in the third epoch of pre-training
    assert len(list((tmp_path / "other").glob("*.epoch"))) == 1
    interrupt(config, 2 * 23 + 23 + 23 + 1)  # what is left of it, the search, and an epoch of tuning
    assert not list((tmp_path / "other").glob("*.epoch"))
    taken = 0
    take = Tracker.step

    def step(self: Tracker, *args: Any, **kwargs: Any) -> None:
        nonlocal taken
        taken += 1
        take(self, *args, **kwargs)

    monkeypatch.setattr(Tracker, "step", step)
    result = search(config)
    assert taken == 2 * 23  # of tuning
    assert result.rows == whole.rows
    for phase in ("pretrain", "initial_tuned"):
        columns = ("epoch", "step", "accuracy", "loss")
        assert metrics(result.folder / phase, *columns) == metrics(whole.folder / phase, *columns)
    assert not list(result.folder.rglob("epoch.pth"))


def test_tuning_with_other_settings_is_refused(longer: Path, tmp_path: Path) -> None:
    options = {"search.epochs": 1, "finetune.epochs": 3}
    interrupt(load_config(longer, options), 23 + 30)
    before = metrics(tmp_path / "out" / "initial_tuned", "epoch", "seconds")
    with pytest.raises(CheckpointError, match=r"another training: lr was .* and is 0\.07\. Remove it"):
        search(load_config(longer, options | {"finetune.lr": 0.07}))
    assert metrics(tmp_path / "out" / "initial_tuned", "epoch", "seconds") == before
    # A checkpoint of another search is not resumed.
    (tmp_path / "out" / "checkpoint.pth").unlink()
    assert search(load_config(longer, options | {"search.epochs": 2})).resumed_step == 0


def test_damaged_file_of_interrupted_training(longer: Path, tmp_path: Path) -> None:
    config = load_config(longer, {"pretrain.cache": str(tmp_path / "other")})
    interrupt(config, 30)
    (file,) = (tmp_path / "other").glob("*.epoch")
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a training"):
        search(config)


def test_a_search_goes_on_with_other_workers(longer: Path) -> None:
    interrupt(load_config(longer), 20)
    assert search(load_config(longer, {"data.workers": 1})).resumed_step == 14


def test_a_checkpoint_of_other_settings_is_refused(longer: Path) -> None:
    interrupt(load_config(longer), 21)
    with pytest.raises(CheckpointError, match=r"data\.batch_size was 64 and is 32; max_steps"):
        search(load_config(longer, {"data.batch_size": 32}))
    assert search(load_config(longer, {"finetune.epochs": 1, "pretrain.epochs": 3})).resumed_step == 21
