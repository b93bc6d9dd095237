from __future__ import annotations

import argparse
import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nni_jackpot.errors import CheckpointError
from nni_jackpot.experiment.folder.pretrained import load_weights
from nni_jackpot.experiment.models.checkpoints import read_checkpoint


class Net(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, classes))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def loaded(path: Path) -> dict[str, Any]:
    other = Net()
    load_weights(other, path)
    return other.state_dict()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(path: Path, names: Any = ()) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net.state_dict(),
        lambda net: {"state_dict": net.state_dict(), "epoch": 3},
        lambda net: {"model": nn.DataParallel(net).state_dict(), "optimizer": {"lr": 0.1}},
        lambda net: {"model": torch.compile(nn.DataParallel(net)).state_dict()},
        lambda net: torch.compile(net).state_dict(),
        lambda net: {"model_ema": AveragedModel(net).state_dict()},
        lambda net: {"model": net.state_dict(), "args": argparse.Namespace(lr=0.1, path=Path("x"))},
        lambda net: {"state_dict": net.state_dict(), "metric": np.float64(0.9), "rng": np.arange(3)},
        lambda net: {"state_dict": {f"model.{n}": v for n, v in net.state_dict().items()}, "callbacks": {}},
        lambda net: {"ema": None, "model": {"state_dict": net.state_dict()}},
        lambda net: {**net.state_dict()},
    ],
)
def test_checkpoints_of_training_scripts(net: Net, tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(net), tmp_path / "my.pth")
    assert same(loaded(tmp_path / "my.pth"), net.state_dict())


def test_compiled_parts(net: Net, tmp_path: Path) -> None:
    state = {name.replace("0.", "0._orig_mod.", 1): value for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "my.pth")
    assert same(loaded(tmp_path / "my.pth"), net.state_dict())


def test_averaged_weights_are_preferred_as_in_timm(
    net: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaged = copy.deepcopy(net)
    nn.init.ones_(averaged[0].weight)
    path = tmp_path / "my.pth"
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": averaged.state_dict()}, path)
    assert same(loaded(path), averaged.state_dict())
    assert same(timm.models.load_state_dict(str(path)), averaged.state_dict())
    assert f"{path} has state_dict_ema, state_dict: the weights in state_dict_ema are used" in caplog.text


def test_safetensors_and_folders(net: Net, tmp_path: Path) -> None:
    state = net.state_dict()
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "model.safetensors")
    save_file(state, tmp_path / "folder" / "model.safetensors")
    assert same(loaded(tmp_path / "model.safetensors"), state)
    assert same(loaded(tmp_path / "folder"), state)


def test_names_that_the_network_has_are_kept(tmp_path: Path) -> None:
    torch.save({"model.0.weight": torch.ones(2)}, tmp_path / "my.pth")
    assert [*read_checkpoint(tmp_path / "my.pth", ["model.0.weight"])] == ["model.0.weight"]


class _Runs:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("run_by_a_pickle",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            Net(),
            "is a whole model as a pickle, which can run code, and is not read. Where you trust the file",
        ),
        ({"model": Net(), "epoch": 3}, ", model is a whole model as a pickle"),
        ({"ema": Net(), "model": None}, ", ema is a whole model as a pickle"),
        ([torch.ones(2)], "is not a state dict: tensors by name are wanted, or a dict with them as one of"),
        ({"optimizer": {"lr": 1}}, "found optimizer"),
        ({"state_dict": {"a": torch.ones(2), "b": 3}}, ", state_dict is not a state dict"),
        ({}, "is not a state dict"),
        ({"a": torch.zeros(1).expand(10**9)}, "claims to be larger"),
        ({"state_dict": {"a": _Runs()}}, "nothing_was_run"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "my.pth")
    said = refused(tmp_path / "my.pth")
    assert not (tmp_path / "run_by_a_pickle").exists()
    assert words in said or words == "nothing_was_run"


def test_other_files_are_refused(tmp_path: Path, net: Net) -> None:
    assert "there is no checkpoint" in refused(tmp_path / "none.pth")
    assert "there is no checkpoint" in refused(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    assert "is not a checkpoint" in refused(tmp_path / "bad.safetensors")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refused(tmp_path / "empty")
    torch.jit.trace(net.eval(), torch.zeros(1, 1, 3, 3)).save(tmp_path / "script.pt")
    assert "Where you trust the file" in refused(tmp_path / "script.pt")
    old = io.BytesIO()
    torch.save({"a": argparse.Namespace(b=1)}, old, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pth").write_bytes(old.getvalue())
    assert "Where you trust the file" in refused(tmp_path / "old.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert "is not a" in refused(tmp_path / "plain.pkl")


def test_another_number_of_classes(tmp_path: Path, net: Net) -> None:
    torch.save(net.state_dict(), tmp_path / "my.pth")
    other = Net(5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        CheckpointError, match=r"my.pth has 3 classes, and the data 5: its classifier does not"
    ):
        load_weights(other, tmp_path / "my.pth")
    assert same(other.state_dict(), before)
