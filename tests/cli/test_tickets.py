from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from nni_jackpot import cli, load_sparse, save_ticket

DIGITS = ROOT / "configs" / "digits" / "resnet.yml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in ``run`` and its pre-trained weights in ``base.pth``."""
    folder = tmp_path_factory.mktemp("tickets")
    overrides = {
        "output": folder / "run",
        "pretrain.cache": folder / "cache",
        "pretrain.epochs": 2,
        "search.epochs": 1,
        "model.width": 4,
    }
    line = ["search", str(DIGITS)]
    for key, value in overrides.items():
        line += ["--set", f"{key}={value}"]
    assert cli.main(line) == 0
    (path,) = (folder / "cache").glob("*.pth")
    (folder / "base.pth").write_bytes(path.read_bytes())
    assert cli.main(["export", str(folder / "run")]) == 0
    return folder


def test_search_export_and_apply_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    """Nothing but the base and the ticket is there, and the predictions are those of the run's jackpot."""
    for name in ("base.pth", "run/jackpot.ticket"):
        (tmp_path / Path(name).name).write_bytes((folder / name).read_bytes())
    line = [sys.executable, "-m", "nni_jackpot.cli", "apply", "jackpot.ticket", "base.pth", "-o", "out.pth"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "89.99 % of the weights" in result.stdout
    found = torch.load(folder / "run" / "jackpot.pth")
    made = torch.load(tmp_path / "out.pth")
    assert list(made) == list(found)
    assert all(torch.equal(made[name], found[name]) for name in found)
    assert (folder / "run" / "jackpot.ticket").stat().st_size < (folder / "base.pth").stat().st_size / 3


def test_safetensors_in_and_out(folder: Path, tmp_path: Path) -> None:
    save_file(torch.load(folder / "base.pth"), tmp_path / "base.safetensors")
    line = ["apply", str(folder / "run" / "jackpot.ticket"), str(tmp_path / "base.safetensors")]
    assert cli.main([*line, "-o", str(tmp_path / "out.safetensors")]) == 0
    found, made = torch.load(folder / "run" / "jackpot.pth"), load_file(tmp_path / "out.safetensors")
    assert made.keys() == found.keys()
    assert all(torch.equal(made[name], found[name]) for name in found)


def test_tied_weights_go_into_safetensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "base.pth")
    save_ticket(tmp_path / "a.ticket", {"1": {"weight": torch.eye(4)}}, model)
    line = ["apply", *(str(tmp_path / name) for name in ("a.ticket", "base.pth"))]
    assert cli.main([*line, "-o", str(tmp_path / "out.safetensors")]) == 0
    made = load_file(tmp_path / "out.safetensors")
    assert torch.equal(made["0.weight"] != 0, torch.eye(4).bool())
    assert torch.equal(made["1.weight"], made["0.weight"])


def test_sparse(folder: Path, tmp_path: Path) -> None:
    line = ["export", str(folder / "run"), "--sparse", "-o", str(tmp_path / "new" / "model.sparse")]
    assert cli.main(line) == 0
    found, made = torch.load(folder / "run" / "jackpot.pth"), load_sparse(tmp_path / "new" / "model.sparse")
    assert list(made) == list(found)
    assert all(torch.equal(made[name], found[name]) for name in found)


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder / "run" / "jackpot.ticket")]) == 0
    printed = capsys.readouterr().out
    assert "stage3.0.conv2.weight │ 16x16x3x3 │" in printed
    assert "sparsity: 89.99 % of" in printed
    assert f"size: {(folder / 'run' / 'jackpot.ticket').stat().st_size:,} bytes" in printed
    assert 'config_list: [{"op_types": ["Conv2d"], "sparse_ratio": 0.9' in printed
    assert 'metrics: {"dense": ' in printed
    assert str(folder) not in printed


def test_a_base_that_is_not_the_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (folder / "cache").glob("*.pth")
    raw = path.read_bytes()
    state = torch.load(path)
    state["fc.weight"][0, 0] += 1
    torch.save(state, path)
    ticket = folder / "run" / "other.ticket"
    try:
        assert cli.main(["export", str(folder / "run"), "-o", str(ticket)]) == 2
        assert "is not what the jackpot of" in capsys.readouterr().err
        assert not ticket.exists()
        line = ["apply", str(folder / "run" / "jackpot.ticket"), str(path), "-o", str(folder / "other.pth")]
        assert cli.main(line) == 2
        assert "found on another base: fc.weight" in capsys.readouterr().err
        assert not (folder / "other.pth").exists()
    finally:
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere"], "config.yml: cannot be read"),
        (["inspect", "nowhere"], "there is no jackpot ticket nowhere"),
        (["inspect", str(DIGITS)], "is not a jackpot ticket"),
        (["apply", "nowhere", "nowhere", "-o", "out.pth"], "there is no jackpot ticket nowhere"),
    ],
)
def test_one_line_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nni-jackpot: error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "list.pth", "gone.pth", "gone.safetensors"])
def test_checkpoints_that_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("text")
    elif name.startswith("list"):
        torch.save([torch.ones(1)], path)
    line = ["apply", str(folder / "run" / "jackpot.ticket"), str(path), "-o", str(tmp_path / "out.pth")]
    assert cli.main(line) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
