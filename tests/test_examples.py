"""The examples run, and what they print is so. How well they learn differs from one processor to the next."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import same
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, load_masks

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[[str], tuple[Any, str]]
# Guessing is right for one of ten of the 397 images, within five standard deviations.
BY_CHANCE = 100 * (0.1 + 5 * (0.1 * 0.9 / 397) ** 0.5)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(name: str) -> tuple[Any, str]:
        """Run an example in a separate folder; return its variables and its output."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        variables = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return SimpleNamespace(**variables), capsys.readouterr().out

    return run


def percent(name: str, output: str) -> float:
    return float(re.search(rf"{name}: +([\d.]+)%", output).group(1))


@torch.no_grad()
def loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(model.eval()(images), labels).item()


def test_quickstart(run: Run) -> None:
    example, output = run("quickstart.py")
    assert percent("jackpot", output) > max(BY_CHANCE, percent("magnitude mask", output))
    assert not same(example.masks, example.magnitude_masks)
    # The plain model is the jackpot.
    assert percent("plain model", output) == percent("jackpot", output)
    weights = [example.model[i].weight for i in (0, 3, 6)]
    assert f"{int(0.9 * sum(w.numel() for w in weights))} of its convolutions' weights are zero" in output
    assert same(load_masks("runs/quickstart/masks.pth"), example.masks)
    for weight, name in zip(weights, ("0", "3", "6"), strict=True):
        assert torch.equal(weight != 0, example.masks[name]["weight"].bool())


def test_own_loop(run: Run) -> None:
    example, output = run("own_loop.py")
    assert percent("jackpot", output) > percent("magnitude mask", output)
    assert same(example.pruner.get_masks(), example.masks)
    for name, size in (("0", 64 * 256), ("2", 256 * 256)):
        assert f"'{name}': '{size - int(0.95 * size)} of {size} kept'" in output


def test_speedup(run: Run) -> None:
    _, output = run("speedup.py")
    assert float(re.search(r"parameters: ([\d.]+) of", output).group(1)) < 0.6
    assert float(re.search(r"differ by at most (\S+)", output).group(1)) < 1e-5


def test_channels(run: Run) -> None:
    example, output = run("channels.py")
    torch.testing.assert_close(example.logits(example.small), example.masked, rtol=1e-4, atol=1e-4)
    assert float(re.search(r"parameters: ([\d.]+) of", output).group(1)) < 0.6
    for name in ("channel jackpot", "channel jackpot, sped up"):
        assert percent(name, output) > BY_CHANCE


def test_distill(run: Run) -> None:
    _, output = run("distill.py")
    start = percent("magnitude mask, norm re-estimated", output)
    assert percent("jackpot found without labels", output) > start
    assert percent("jackpot found by labels", output) > start


def test_deploy(run: Run) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    example, output = run("deploy.py")
    for name in ("jackpot", "jackpot, int8 simulated", "jackpot, onnxruntime", "jackpot, onnxruntime int8"):
        assert percent(name, output) > BY_CHANCE
    images = example.images[example.test]
    logits = example.logits(example.model)
    torch.testing.assert_close(example.jackpot(images), logits, rtol=1e-3, atol=1e-3)
    # Eight bits are some 0.4% of the largest number, at the weights and inputs of each of eight layers.
    assert (example.quantized(images) - logits).norm() < 0.1 * logits.norm()
    assert percent("zeros among the int8 weights", output) >= 90
    sizes = dict(re.findall(r"(\w+)\.onnx: .* zipped +(\d+) KiB", output))
    assert 10 * int(sizes["int8"]) < int(sizes["dense"])


def test_ticket(run: Run) -> None:
    example, output = run("ticket.py")
    assert "the same predictions, bit for bit" in output
    assert "the base is back" in output
    for sparsity in ("90%", "95%"):
        assert percent(f"{sparsity} sparse", output) == percent(f"in the box, {sparsity}", output)
    # The last jackpot, and the mask that it started from.
    images, labels = example.images[example.train], example.labels[example.train]
    start = LotteryJackpotPruner(copy.deepcopy(example.base), example.config_list)
    start.reestimate_norm(images.split(200))
    assert loss(example.model, images, labels) < loss(start.bound_model, images, labels)


def test_every_example_is_run_here() -> None:
    names = {
        "run_onnx.py",  # in tests/cli/test_practitioner.py
        "quickstart.py",
        "own_loop.py",
        "speedup.py",
        "channels.py",
        "distill.py",
        "ticket.py",
        "deploy.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == names
