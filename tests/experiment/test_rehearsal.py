"""A dry run tells the truth of this machine: what it has, and how long it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nni_jackpot import cli
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.rehearsal import Pace
from nni_jackpot.experiment.run import pretrain


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    content = {
        "output": "out",
        "device": "cpu",
        "data": {"name": "digits", "batch_size": 64, "train_images": 300},
        "model": {"width": 2},
        "pretrain": {"epochs": 1, "lr": 0.1, "cache": "cache"},
        "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.8, "global_group_id": 0}],
        "search": {"epochs": 1},
        "finetune": {"epochs": 0, "lr": 0.05},
    }
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def dry(path: Path, **settings: Any) -> list[str]:
    words = [w for key, value in settings.items() for w in ("--set", f"{key.replace('__', '.')}={value}")]
    return ["search", str(path), "--dry-run", *words]


def test_time_is_estimated_and_nothing_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(dry(path)) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 runs, 10 steps in all, about [\d:]+ on this machine; nothing was trained", out)
    assert re.search(r"│ time +│ [\d:]+ +│", out)
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yml"]


def test_an_estimate_is_of_all_steps_and_looks_at_the_test_images() -> None:
    assert Pace(step=0.5, test=2.0).of_run(steps=100, epochs=6) == 50 + (6 + 4) * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pretrain__checkpoint": "none.pth"}, "there is no checkpoint none.pth"),
        ({"pretrain__checkpoint": "run.yml"}, "run.yml is not a checkpoint"),
        ({"device": "cuda"}, "device cuda does not exist"),
        ({"device": "cuda:7"}, "device cuda:7 does not exist"),
        ({"data__name": "mnist", "data__root": "nowhere"}, "nowhere lacks train-images"),
        ({"data__name": "cifar10"}, "data.root"),
        ({"data__name": "image_folder", "data__root": "nowhere"}, "nowhere/train must hold"),
        ({"data__train_images": 2000}, "data.train_images: found 2000"),
        ({"config_list.0.sparse_ratio": 0.9999}, "layers of global_group_id 0 would share"),
        ({"config_list.0.op_types": "[Conv3d]"}, "selects no module"),
        ({"data__image_size": 8, "model__name": "vgg19", "model__width": 16}, "cannot take images of"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    settings: dict[str, Any],
    words: str,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(dry(path, **settings)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yml"]


def test_a_gpu_too_many(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(dry(path, device="cuda:2")) == 2
    assert "device cuda:2 does not exist: PyTorch sees 2, from cuda:0 on" in capsys.readouterr().err


def test_the_run_is_named_that_would_be_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--sweep", "pretrain.checkpoint=null,none.pth", "--sweep", "seed=0,1"]
    assert cli.main([*dry(path), *sweep]) == 2
    assert "error: checkpoint=none.pth, seed=0: there is no checkpoint" in capsys.readouterr().err


def flat_checkpoint(path: Path) -> None:
    """Write weights of which those of one layer rank below all others."""
    config = load_config(path)
    model = build_model(config.model, 10, 1)
    with torch.no_grad():
        model.conv1.weight.fill_(1e-9)
    torch.save(model.state_dict(), path.parent / "flat.pth")


def test_a_layer_that_would_keep_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat_checkpoint(path)
    paper = {"pretrain__checkpoint": "flat.pth", "search__recipe": "paper"}
    assert cli.main(dry(path, **paper)) == 2
    assert "weights of conv1.weight would be kept" in capsys.readouterr().err
    # By another criterion it may keep some.
    assert cli.main(dry(path, **paper, search__init="random")) == 0
    # The default recipe leaves each layer some.
    assert cli.main(dry(path, pretrain__checkpoint="flat.pth")) == 0


def test_what_ranking_will_leave_of_weights_to_be_trained_is_not_known(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = build_model

    def built(*args: Any) -> torch.nn.Module:
        model = build(*args)
        with torch.no_grad():
            model.conv1.weight.fill_(1e-9)
        return model

    monkeypatch.setattr("nni_jackpot.experiment.rehearsal.build_model", built)
    assert cli.main(dry(path, search__recipe="paper")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("note: if trained weights rank as untrained ones do") for line in lines)
    assert cli.main(dry(path, search__recipe="paper", pretrain__epochs=0)) == 2  # they will not be trained


def test_weights_that_are_there_are_looked_at(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached, _ = pretrain(load_config(path))
    assert cli.main(dry(path)) == 0
    assert "cached" in capsys.readouterr().out
    cached.write_bytes(b"nonsense")
    assert cli.main(dry(path)) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


def test_data_that_the_run_would_fetch_need_not_be_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"data__name": "mnist", "data__root": "nowhere", "data__download": "true"}
    assert cli.main(dry(path, **settings)) == 0
    assert not (path.parent / "nowhere").exists()


@pytest.mark.parametrize(
    "sweep",
    [
        ["seed=0,1"],
        ["config_list.0.sparse_ratio=0.5,0.6", "search.recipe=paper,default", "search.lr=0.01", "seed=0"],
        ["output=" + "a" * 60 + "/" + "b" * 60 + ",c"],
        ["pretrain.cache=" + "d" * 150],
        ["model.width=2,3", "data.batch_size=32,64"],
    ],
)
def test_all_fits_a_screen(sweep: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*dry(path), *(w for part in sweep for w in ("--sweep", part))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("├") for line in lines) <= 1


def test_a_finished_run_takes_no_steps_and_is_not_in_the_way_of_itself(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", str(path)]) == 0
    before = sorted(path.parent.rglob("*"))
    capsys.readouterr()
    assert cli.main(dry(path)) == 0
    assert "1 runs, 0 steps in all, about 00:00 on this machine" in capsys.readouterr().out
    assert cli.main([*dry(path), "--overwrite"]) == 0
    assert "1 runs, 5 steps in all" in capsys.readouterr().out  # the weights are there
    assert cli.main(dry(path, search__epochs=2)) == 2
    assert "holds a finished run of other settings: search.epochs" in capsys.readouterr().err
    assert sorted(path.parent.rglob("*")) == before


def test_a_folder_that_cannot_be_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("output", "pretrain__cache"):
        assert cli.main(dry(path, **{name: "run.yml/below"})) == 2
        assert capsys.readouterr().err.count("\n") == 1
