"""Where the weights of a run come from: training, a file, or those published, on folders of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from conftest import model_of, same_state
from PIL import Image
from published_weights import publish
from torch import nn

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, TrainingDivergedError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.data.loading import load_data
from nni_jackpot.experiment.folder.pretrained import cache_path, load_weights
from nni_jackpot.experiment.run import pretrain, search
from nni_jackpot.experiment.train import accuracy


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


def test_diverging_pretraining_leaves_no_weights(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="lower the lr"):
        pretrain(load_config(config_file, {"pretrain.lr": 1e30}))
    assert not list((tmp_path / "pretrained").glob("*.pth"))
    pretrain(load_config(config_file, {"pretrain.lr": 0.1}))  # nothing of it is in the way


# -- published weights


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
    config = load_config(folder_file, overrides)
    path, found = pretrain(config)
    published = torchvision.models.get_model("shufflenet_v2_x0_5", weights="IMAGENET1K_V1")
    assert same_state(torch.load(path), published.state_dict())
    assert found == accuracy(published, load_data(config.data, config.seed).test, torch.device("cpu"))


def test_published_weights_on_a_folder_of_images(folder_file: Path) -> None:
    # Too low a rate to change a digit of any weight but a zero, as biases of norms are.
    config = load_config(folder_file, {"pretrain.lr": 1e-30})
    result = search(config)
    assert [row.kind for row in result.rows][-1] == "initial_tuned"
    assert cache_path(config).name.startswith("image_folder-torchvision-shufflenet_v2_x0_5-")
    published = torchvision.models.get_model("shufflenet_v2_x0_5", weights="IMAGENET1K_V1").state_dict()
    tuned = torch.load(cache_path(config))
    assert tuned["fc.weight"].shape == (2, 1024)  # of other classes, and new
    kept = [name for name, value in published.items() if value.ndim == 4]
    assert kept
    assert all(torch.equal(tuned[name], published[name]) for name in kept)


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
    monkeypatch.setattr("nni_jackpot.experiment.running.context.train_weights", None)
    with pytest.raises(ExperimentConfigError, match=words):
        search(load_config(folder_file, overrides))
