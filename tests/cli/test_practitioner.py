"""From a checkpoint that was trained elsewhere to a ticket, and to an ONNX file that runs without the package."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tiny_vision import odd_processor, tiny_classifier
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoImageProcessor

from nni_jackpot import cli, load_ticket
from nni_jackpot.experiment.reference.templates import TEMPLATES
from nni_jackpot.experiment.running.found import find
from nni_jackpot.search.match_dense import values_of

ROOT = Path(__file__).parents[2]
EXAMPLES, START = ROOT / "examples", ROOT / "docs" / "start.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with images of two classes that noise and size make hard to tell apart."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 20)):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "my_images" / part / name).mkdir(parents=True)
            for j in range(count):
                shape = (int(rng.integers(32, 48)), int(rng.integers(32, 48)), 3)
                pixels = np.clip(rng.normal(110 + 16 * i + rng.normal(0, 14), 40, shape), 0, 255)
                place = tmp_path / "my_images" / part / name / f"{j}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(model: nn.Module, transform: Callable[..., Any]) -> float:
    """Train a model by Adam, and return its accuracy in percent."""
    parts = [ImageFolder(f"my_images/{part}", transform) for part in ("train", "val")]
    train, val = ((torch.stack([image for image, _ in part]), torch.tensor(part.targets)) for part in parts)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(3):
        for at in torch.randperm(len(train[1])).split(16):
            optimizer.zero_grad()
            F.cross_entropy(values_of(model(train[0][at])), train[1][at]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * (values_of(model(val[0])).argmax(1) == val[1]).float().mean().item()


def deployed() -> None:
    """Deploy the jackpot as ONNX, and check its predictions."""
    assert cli.main(["deploy", "out", "--form", "onnx"]) == 0
    check_onnx()


def check_onnx() -> None:
    """Check the predictions of the ONNX file in a process without the package and without PyTorch."""
    images = sorted(map(str, Path("my_images/val").glob("*/*")))
    code = "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'nni', 'nni_jackpot']))"
    run = f"{code}; runpy.run_path({str(EXAMPLES / 'run_onnx.py')!r}, run_name='__main__')"
    line = [sys.executable, "-c", run, "out/deployed/onnx.onnx", *images]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    found = find(Path("out"), None, {}, [])
    with torch.no_grad():
        outputs = [values_of(found.model.eval()(batch)) for batch, _ in found.context.data.test]
    names = [("cat", "dog")[label] for label in torch.cat(outputs).argmax(1).tolist()]
    assert printed == [f"{path}: {name}" for path, name in zip(images, names, strict=True)]


def searched(*options: str) -> tuple[float, dict[str, Any]]:
    """Search by one line and export the ticket; return the dense accuracy in percent, and its provenance."""
    line = ["--data", "my_images", "--epochs", "1", "--output", "out", "--set", "data.batch_size=16"]
    assert cli.main(["search", *line, *options]) == 0
    return exported_dense(), load_ticket("out/jackpot.ticket").metadata


def exported_dense() -> float:
    """Export the ticket of the run; return its dense accuracy in percent."""
    assert cli.main(["export", "out"]) == 0
    rows = {row["kind"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}
    assert rows["jackpot"]["sparsity"] == pytest.approx(0.9, abs=2e-3)
    return 100 * rows["dense"]["accuracy"]


def test_a_checkpoint_of_torchvision_with_odd_preprocessing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=2)
    mean, std = [0.1, 0.35, 0.6], [0.11, 0.5, 0.2]
    steps = [
        v2.Resize(30, InterpolationMode.BICUBIC),
        v2.CenterCrop(24),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    own = trained(model, v2.Compose(steps))
    state = nn.DataParallel(model).state_dict()
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, "my.pth")
    seen = {"resize": 30, "interpolation": "bicubic", "mean": mean, "std": std}
    settings = ["--set", "data.image_size=24", "--set", f"data.preprocess={json.dumps(seen)}"]
    dense, told = searched(
        "--model", "torchvision/shufflenet_v2_x0_5", "--checkpoint", "my.pth", *settings, "--preset", "mobile"
    )
    assert dense == pytest.approx(own, abs=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert f"dense accuracy {own:.2f} % on 40 images of 3x24x24" in lines
    assert told["preprocessing"] == {"image_size": 24, "preprocess": {**seen, "crop": "center"}}
    assert yaml.safe_load(Path("out/config.yml").read_text())["data"]["preprocess"] == {
        **seen,
        "crop": "center",
    }
    deployed()


def test_a_checkpoint_of_timm_with_its_own_preprocessing(folder: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    own = trained(model, create_transform(**resolve_data_config({}, model=model), is_training=False))
    torch.save({"state_dict": model.state_dict(), "arch": "test_resnet"}, "my.pth")
    dense, told = searched("--model", "timm/test_resnet", "--checkpoint", "my.pth")
    assert dense == pytest.approx(own, abs=0.1)
    assert told["preprocessing"]["image_size"] == 160
    deployed()


def test_a_checkpoint_of_transformers_with_odd_preprocessing(folder: Path) -> None:
    model, processor = tiny_classifier("ResNet"), odd_processor()
    own = trained(model, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    model.save_pretrained("my_model")
    processor.save_pretrained("my_model")
    commands = re.findall(r"^nni-jackpot (.* out\b.*)$", START.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert cli.main(shlex.split(command)) == 0
    assert exported_dense() == pytest.approx(own, abs=0.1)
    assert load_ticket("out/jackpot.ticket").metadata["preprocessing"]["preprocess"]["resize"] == 30
    check_onnx()
    assert cli.main(["deploy", "out", "--form", "hf"]) == 0
    assert AutoImageProcessor.from_pretrained("out/deployed/hf").size == processor.size


def test_given_weights_that_guess_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    nn.init.zeros_(model.get_classifier().weight)
    torch.save(model.state_dict(), "my.pth")
    searched("--model", "timm/test_resnet", "--checkpoint", "my.pth", "--set", "data.image_size=32")
    assert "the dense network does no better than guessing among 2 classes" in caplog.text
    assert "how images become its inputs: image_size 32, resize 3" in caplog.text


def test_the_line_stands_for_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["search", "--model", "timm/resnet18", "--checkpoint", "my.pth", "--data", "my_images"]
    assert cli.main([*line, "--set", "search.lr=0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {
        "output": "runs/resnet18-my_images-weights-0.9",
        "data": {"name": "image_folder", "root": "my_images"},
        "model": {"name": "timm/resnet18"},
        "pretrain": {"checkpoint": "my.pth"},
        "preset": "weights",
        "sparsity": 0.9,
        "search": {"epochs": 3, "lr": 0.5},
    }
    Path("run.yml").write_text(printed)
    assert cli.main(["search", "run.yml", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["preprocess"]["resize"] == 235


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "resnet"], "found --model, allowed: FILE, or at least --model and --data"),
        (["x.yml", "--sparsity", "0.5"], "found FILE and --sparsity, allowed: one of them"),
        (["--model", "timm/resnet18", "--data", "x"], "the command line: pretrain: is missing, allowed: "),
        (
            ["--model", "resnet", "--data", "digits", "--preset", "x"],
            "preset: found 'x' (str), allowed: null or",
        ),
    ],
)
def test_lines_that_will_not_do(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert cli.main(["search", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_files_of_runs(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--template", name]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["output"] == TEMPLATES[name]["output"]
    Path("run.yml").write_text(printed)
    assert cli.main(["search", "run.yml", "--print-config"]) == 0
