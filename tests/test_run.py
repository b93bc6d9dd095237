from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from interruption import stopping
from PIL import Image
from published_weights import publish
from torch import nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_masks, mask_overlap
from nni_jackpot.errors import (
    CheckpointError,
    ConfigListError,
    DatasetNotFoundError,
    EmptyMatchError,
    ExperimentConfigError,
    JackpotError,
    OutputFolderError,
    SearchDivergedError,
    TrainingDivergedError,
)
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.data import load_data
from nni_jackpot.experiment.epochs import EpochFile
from nni_jackpot.experiment.images import ImageTensors
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.pretrained import cache_path, load_weights
from nni_jackpot.experiment.report import summary
from nni_jackpot.experiment.run import pretrain, search
from nni_jackpot.experiment.train import accuracy, train_weights
from nni_jackpot.recipe import RECIPES
from nni_jackpot.tracking import Tracker

CPU = torch.device("cpu")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run that takes a second or two."""
    content = {
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "data": {"name": "digits", "batch_size": 64},
        "model": {"width": 6},
        "pretrain": {"epochs": 3, "lr": 0.1, "cache": str(tmp_path / "pretrained")},
        "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.8, "global_group_id": 0}],
        "search": {"epochs": 2},
        "finetune": {"epochs": 1, "lr": 0.05},
    }
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(config_file: Path) -> RunConfig:
    return load_config(config_file)


def model_of(config: RunConfig) -> nn.Module:
    return build_model(config.model, num_classes=10, in_channels=1)


def test_search_end_to_end(config_file: Path, tmp_path: Path) -> None:
    config = load_config(
        config_file, {"search.reestimate_norm": False}
    )  # which would be after the last epoch
    result = search(config)
    rows = {row.kind: row for row in result.rows}
    assert list(rows) == ["dense", "initial", "initial_norm", "jackpot", "initial_tuned"]
    assert rows["dense"].accuracy > 0.8
    assert rows["jackpot"].accuracy > rows["initial"].accuracy + 0.2
    assert rows["jackpot"].sparsity == pytest.approx(0.8, abs=1e-3)
    assert 0.5 < result.overlap < 1.0

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

    written = load_config(out / "config.yml").search
    assert (written.lr, written.growth) == (RECIPES["jackpot"].lr, RECIPES["jackpot"].growth)
    assert replace(config, search=written) == load_config(out / "config.yml")
    assert written.in_short() == config.search
    assert json.loads((out / "results.json").read_text())["rows"][3]["accuracy"] == rows["jackpot"].accuracy
    with (out / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["epoch"] for line in lines] == ["1", "2"]
    assert float(lines[-1]["accuracy"]) == rows["jackpot"].accuracy
    assert {"loss", "learning_rate", "flips", "overlap", "seconds"} <= lines[0].keys()
    assert list((out / "tensorboard").iterdir())
    assert not list(tmp_path.rglob("*.part"))


def test_channels_last(config_file: Path, tmp_path: Path) -> None:
    plain = load_config(config_file, {"finetune.epochs": 0})
    config = load_config(config_file, {"model.channels_last": True, "finetune.epochs": 0})
    assert model_of(config).conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert cache_path(config) != cache_path(plain)
    result = search(config)
    # The same computation, summed in another order.
    assert result.rows[-1].accuracy == pytest.approx(search(plain, overwrite=True).rows[-1].accuracy, abs=0.1)
    masks = load_masks(tmp_path / "out" / "masks.pth")
    assert masks["conv1"]["weight"].is_contiguous()


def test_results_stay_when_another_config_comes(config_file: Path, tmp_path: Path) -> None:
    search(load_config(config_file, {"search.epochs": 0, "finetune.epochs": 0}))
    results = tmp_path / "out" / "results.json"
    pretrain(load_config(config_file, {"search.epochs": 0, "finetune.epochs": 0, "data.workers": 0}))
    assert results.exists()
    with pytest.raises(OutputFolderError, match=r"finished run of other settings: search\.epochs was 0"):
        pretrain(load_config(config_file, {"search.epochs": 1, "finetune.epochs": 0}))
    assert results.exists()


def test_weights_are_tuned_under_either_mask(config_file: Path) -> None:
    result = search(load_config(config_file, {"finetune.under": "both", "finetune.epochs": 2}))
    rows = {row.kind: row for row in result.rows}
    assert list(rows)[-2:] == ["initial_tuned", "jackpot_tuned"]
    assert (rows["initial_tuned"].epochs, rows["jackpot_tuned"].epochs) == (2, 4)
    # One starts from the dense network's weights and statistics, the other from the jackpot's.
    assert rows["jackpot_tuned"].accuracy >= rows["jackpot"].accuracy - 0.05
    only = search(
        load_config(config_file, {"finetune.under": "jackpot", "finetune.epochs": 2}), overwrite=True
    )
    assert [row.kind for row in only.rows][3:] == ["jackpot", "jackpot_tuned"]
    assert only.rows[-1] == rows["jackpot_tuned"]


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


def test_pretraining_happens_once(config: RunConfig, config_file: Path) -> None:
    path, first = pretrain(config)
    written = path.stat().st_mtime_ns
    again, second = pretrain(load_config(config_file, {"search.lr": 3.0, "config_list.0.sparse_ratio": 0.5}))
    assert (again, second) == (path, first)
    assert path.stat().st_mtime_ns == written
    assert cache_path(load_config(config_file, {"pretrain.lr": 0.01})) != path
    assert cache_path(load_config(config_file, {"seed": 1})) != path


def test_no_epochs_of_pretraining_are_random_weights(config_file: Path) -> None:
    config = load_config(config_file, {"pretrain.epochs": 0})
    path, _ = pretrain(config)
    torch.manual_seed(config.seed)
    drawn = model_of(config)
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in drawn.state_dict().items())


def test_norm_statistics_can_be_held_and_estimated_anew(config_file: Path) -> None:
    overrides = {"search.recipe": "paper", "search.lr": 1.0, "search.adapt_norm": False, "finetune.epochs": 0}
    held = search(load_config(config_file, overrides))
    anew = search(load_config(config_file, {**overrides, "search.reestimate_norm": True}), overwrite=True)
    assert held.rows[-1].accuracy != anew.rows[-1].accuracy


def test_accuracies_in_the_midst_are_of_norm_statistics_that_fit(config_file: Path, tmp_path: Path) -> None:
    curves = []
    for anew in (False, True):
        out = tmp_path / str(anew)
        search(
            load_config(
                config_file,
                {
                    "search.epochs": 4,
                    "search.reestimate_norm": anew,
                    "finetune.epochs": 0,
                    "output": str(out),
                },
            )
        )
        with (out / "metrics.csv").open() as file:
            curves.append([float(line["accuracy"]) for line in csv.DictReader(file)])
    # Training has seen soft masks, and their statistics.
    assert curves[1][1] > curves[0][1] + 0.1
    # Nobody has looked, as far as the search can tell.
    adapted, anew = (load_masks(tmp_path / name / "masks.pth") for name in ("False", "True"))
    assert mask_overlap(adapted, anew).total == 1.0


def test_a_look_takes_no_samples_of_a_supermask(config_file: Path, tmp_path: Path) -> None:
    for anew in (False, True):
        overrides = {"search.method": "supermask", "search.reestimate_norm": anew, "finetune.epochs": 0}
        search(load_config(config_file, {**overrides, "output": str(tmp_path / str(anew))}))
    adapted, anew = (load_masks(tmp_path / name / "masks.pth") for name in ("False", "True"))
    assert mask_overlap(adapted, anew).total == 1.0


def test_limited_swaps_stay_nearer_to_the_initial_mask(config_file: Path) -> None:
    free, limited = (
        search(
            load_config(
                config_file,
                {
                    "search.recipe": "paper",
                    "search.lr": 1.0,
                    "search.swap_limit": limit,
                    "finetune.epochs": 0,
                },
            ),
            overwrite=True,
        )
        for limit in (None, 1e-3)
    )
    assert free.overlap < limited.overlap < 1.0


def test_a_checkpoint_of_one_s_own(config: RunConfig, config_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(model_of(config).state_dict(), tmp_path / "mine.pth")
    path, _ = pretrain(load_config(config_file, {"pretrain.checkpoint": str(tmp_path / "mine.pth")}))
    assert path == tmp_path / "mine.pth"
    assert not (tmp_path / "pretrained").exists()


def test_bad_checkpoints(config: RunConfig, tmp_path: Path) -> None:
    model = model_of(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.state_dict()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save({**state, "fc.weight": torch.ones(3)}, tmp_path / "shape.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name, words in (
        ("none.pth", "there is no checkpoint"),
        ("linear.pth", "of another network: .* is missing"),
        ("shape.pth", r"fc\.weight has shape \(3,\)"),
        ("list.pth", "not a state dict"),
        ("text.pth", "not a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_weights(model, tmp_path / name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
    monkeypatch.setattr("nni_jackpot.experiment.run.train_weights", None)
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

    monkeypatch.setattr("nni_jackpot.experiment.run.cross_entropy_step", step)
    with pytest.raises(SearchDivergedError, match="at step 5 of the search"):
        search(config)
    assert not (tmp_path / "out" / "masks.pth").exists()


def test_diverging_pretraining_leaves_no_weights(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="lower the lr"):
        pretrain(load_config(config_file, {"pretrain.lr": 1e30}))
    assert not list((tmp_path / "pretrained").glob("*.pth"))
    pretrain(load_config(config_file, {"pretrain.lr": 0.1}))  # nothing of it is in the way


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
    command = [sys.executable, "-m", "nni_jackpot.cli", "search", str(longer)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "checkpoint.pth"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random.random() * 0.2)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    result = search(load_config(longer))
    assert result.resumed_step >= 7
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
    monkeypatch.setattr("nni_jackpot.experiment.run.build_model", build)
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
    assert loaded == 23 + 8 * 23 - 56  # of the first epoch for the statistics of the initial mask
    assert result.rows == whole.rows
    assert _equal(torch.load(whole.folder / "masks.pth"), torch.load(result.folder / "masks.pth"))


def test_a_search_that_is_over_is_not_repeated(longer: Path, tmp_path: Path) -> None:
    options = {"finetune.epochs": 2, "search.growth": 1.0}  # the masks grow to the end, and are then settled
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
    monkeypatch.setattr("nni_jackpot.experiment.run.build_model", build)
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
    # Of another search there is nothing to go on from.
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


# -- other networks and data


@pytest.fixture
def folder_file(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on a folder of images of two classes, from published weights."""
    for part, size in (("train", 12), ("val", 6)):
        for i, name in enumerate(("dark", "light")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for j in range(size):
                color = (120 * i + 3 * j, 120 * i + 50, 120 * i + 100)
                Image.new("RGB", (40, 36), color).save(tmp_path / "images" / part / name / f"{j}.png")
    torch.manual_seed(3)
    publish("shufflenet_v2_x0_5", tmp_path, monkeypatch)
    content = yaml.safe_load(config_file.read_text())
    content["data"] = {
        "name": "image_folder",
        "root": str(tmp_path / "images"),
        "image_size": 32,
        "batch_size": 8,
        "augment": True,
        "workers": 1,
    }
    content["model"] = {"name": "torchvision/shufflenet_v2_x0_5", "weights": "IMAGENET1K_V1"}
    content["pretrain"] |= {"epochs": 1, "lr": 1e-4}
    content["search"] |= {"epochs": 1}
    config_file.write_text(yaml.safe_dump(content))
    return config_file


def test_published_weights_of_imagenet_as_they_are(folder_file: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i in range(1000):
            (tmp_path / "imagenet" / part / f"n{i:08}").mkdir(parents=True)
            Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(
                tmp_path / "imagenet" / part / f"n{i:08}" / "0.JPEG"
            )
    overrides = {"data.name": "imagenet", "data.root": str(tmp_path / "imagenet"), "pretrain.epochs": 0}
    path, accuracy = pretrain(load_config(folder_file, overrides))
    published = torchvision.models.get_model("shufflenet_v2_x0_5", weights="IMAGENET1K_V1").state_dict()
    assert _equal(torch.load(path), published)
    assert accuracy < 0.1


def test_published_weights_on_a_folder_of_images(folder_file: Path) -> None:
    config = load_config(folder_file)
    result = search(config)
    assert [row.kind for row in result.rows][-1] == "initial_tuned"
    assert cache_path(config).name.startswith("image_folder-torchvision-shufflenet_v2_x0_5-")
    published = torchvision.models.get_model("shufflenet_v2_x0_5", weights="IMAGENET1K_V1").state_dict()
    tuned = torch.load(cache_path(config))
    # One epoch from the published weights does not lead far, but for the classifier, which is new.
    assert tuned["fc.weight"].shape == (2, 1024)
    near = [
        torch.nn.functional.cosine_similarity(value.flatten(), published[name].flatten(), dim=0)
        for name, value in tuned.items()
        if value.ndim == 4
    ]
    assert min(near) > 0.9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pretrain.epochs": 0}, "for other classes than the dataset's 2, .* give it pretrain.epochs > 0"),
        ({"pretrain.checkpoint": "mine.pth"}, "pretrain.checkpoint is mine.pth: one of them must be null"),
        ({"model.name": "vgg19", "model.weights": None, "data.image_size": 8}, "Set data.image_size"),
        ({"data.name": "digits"}, "for images of 3 channels"),
    ],
)
def test_a_start_that_will_not_do(
    folder_file: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict, words: str
) -> None:
    monkeypatch.setattr("nni_jackpot.experiment.run.train_weights", None)
    with pytest.raises(ExperimentConfigError, match=words):
        search(load_config(folder_file, overrides))
