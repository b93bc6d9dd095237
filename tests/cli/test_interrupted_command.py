"""An interrupted command ends with one line, and resumes when it is called again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import write_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(
        tmp_path,
        data={"train_images": None},
        pretrain={"epochs": 0},
        config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.8}],
        search={"epochs": 12, "checkpoint_every": 5},
        finetune={"epochs": 0, "under": "initial"},
    )


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells have programs in the background ignore


def test_ctrl_c_in_the_midst_of_a_search(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "nni_jackpot.cli", "search", str(path), "--set", "data.workers=1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("search: step"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 130
    said = r"nni-jackpot: interrupted at step (\d+) of 276 \(search\): run the same command to resume\n"
    found = re.fullmatch(said, err)
    assert found is not None, err
    assert int(found[1]) >= 23
    assert lines[0] == f"{path}: the run is valid; loading NNI\n"
    assert re.fullmatch(
        r"cpu, \d+ threads; digits: 1,437 images of 1x8x8 for training, 10 classes; resnet-8, 2 filters: "
        r"[\d,]+ weights\n",
        lines[1],
    )
    assert re.fullmatch(r"dense accuracy [\d.]+ % on 360 images of 1x8x8\n", lines[2])
    assert re.fullmatch(r"searching [\d,]+ weights, [\d.]+ % of them to be zero\n", lines[3])

    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.isascii()
    assert "| jackpot" in again.stdout
    step = int(re.search(r"resumed at step (\d+)", again.stdout).group(1))
    assert 20 <= step <= int(found[1])
    tracked = [int(at) for at in re.findall(r"^search: step (\d+) of 276, epoch", again.stdout, re.M)]
    assert tracked == list(range(-(-(step + 1) // 23) * 23, 277, 23))
    assert len(list((path.parent / "out" / "tensorboard").iterdir())) == 1
