from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def percent(name: str, output: str) -> float:
    return float(re.search(rf"{name}: +([\d.]+)%", output).group(1))


@pytest.mark.parametrize("name", ["quickstart.py", "own_loop.py"])
def test_the_jackpot_beats_its_initial_mask(name: str, tmp_path: Path) -> None:
    output = run(name, tmp_path)
    assert percent("jackpot", output) > percent("magnitude mask", output) + 5
    assert percent("jackpot", output) > percent("dense", output) - 5


def test_speedup(tmp_path: Path) -> None:
    output = run("speedup.py", tmp_path)
    assert float(re.search(r"parameters: ([\d.]+) of", output).group(1)) < 0.6
    assert float(re.search(r"differ by at most (\S+)", output).group(1)) < 1e-5


def test_channels(tmp_path: Path) -> None:
    output = run("channels.py", tmp_path)
    assert float(re.search(r"differ by at most (\S+)", output).group(1)) < 1e-4
    assert float(re.search(r"parameters: ([\d.]+) of", output).group(1)) < 0.6
    assert percent("channel jackpot, sped up", output) == percent("channel jackpot", output) > 75


def test_distill(tmp_path: Path) -> None:
    output = run("distill.py", tmp_path)
    found = percent("jackpot found without labels", output)
    assert found > percent("magnitude mask, norm re-estimated", output) + 10
    assert found > percent("jackpot found by labels", output) - 2


def test_deploy(tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    output = run("deploy.py", tmp_path)
    found = percent("jackpot", output)
    assert found > percent("dense", output) - 3
    assert percent("jackpot, onnxruntime", output) == found
    for name in ("jackpot, int8 simulated", "jackpot, onnxruntime int8"):
        assert percent(name, output) > found - 2
    assert percent("zeros among the int8 weights", output) >= 90
    sizes = dict(re.findall(r"(\w+)\.onnx: .* zipped +(\d+) KiB", output))
    assert 10 * int(sizes["int8"]) < int(sizes["dense"])


def test_ticket(tmp_path: Path) -> None:
    output = run("ticket.py", tmp_path)
    assert "the same predictions, bit for bit" in output
    assert "the base is back" in output
    for sparsity in ("90%", "95%"):
        assert percent(f"{sparsity} sparse", output) == percent(f"in the box, {sparsity}", output) > 90


def test_every_example_is_run_here() -> None:
    names = {
        "quickstart.py",
        "own_loop.py",
        "speedup.py",
        "channels.py",
        "distill.py",
        "ticket.py",
        "deploy.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == names
