"""Published weights come from the file that their name tells, and no code of a file is run."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_weights import publish

from nni_jackpot.errors import CheckpointError
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.models.published import state_of
from nni_jackpot.experiment.models.section import ModelConfig

NAME = "squeezenet1_1"
URL = "https://download.pytorch.org/models/"


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def keep(content: bytes, folder: Path) -> str:
    """Put a file under the name of its own hash, and return its address."""
    path = folder / f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    return f"{URL}{path.name}"


def test_a_file_of_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(NAME, tmp_path, monkeypatch)
    (path,) = (tmp_path / "hub" / "checkpoints").iterdir()
    torch.save({name: 2 * value for name, value in torch.load(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"squeezenet1_1-\w+\.pth is damaged, or another file: its SHA"):
        build_model(ModelConfig(name=f"torchvision/{NAME}", weights="IMAGENET1K_V1"), 1000, 3)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_no_code_of_a_file_is_run_that_has_the_hash(tmp_path: Path, checkpoints: Path, form: str) -> None:
    marker, made = tmp_path / "attacked", tmp_path / "made.pth"
    attack = {"features.0.weight": Attack(marker)}
    if form == "pickle":
        made.write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, made, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="is not a file of weights"):
        state_of(keep(made.read_bytes(), checkpoints))
    assert not marker.exists()


def test_torchvision_is_as_it_was_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = publish(NAME, tmp_path, monkeypatch)
    config = ModelConfig(name=f"torchvision/{NAME}", weights="IMAGENET1K_V1")
    built = build_model(config, 1000, 3).state_dict()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    from torchvision.models import get_model_weights

    assert "get_state_dict" not in vars(get_model_weights(NAME)["IMAGENET1K_V1"])


def test_what_is_fetched_has_to_have_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Path
) -> None:
    asked: list[str | None] = []

    def fetch(url: str, path: str, hash_prefix: str | None) -> None:
        asked.append(hash_prefix)
        torch.save({"weight": torch.ones(2)}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert torch.equal(state_of(f"{URL}mnasnet0.5_top1_67.823-3ffadce67e.pth")["weight"], torch.ones(2))
    assert asked == ["3ffadce67e"]


def test_a_failed_fetch_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(CheckpointError, match="no network"):
        build_model(ModelConfig(name=f"torchvision/{NAME}", weights="IMAGENET1K_V1"), 1000, 3)
    assert not list(tmp_path.iterdir())
