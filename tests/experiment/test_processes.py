from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from by_hand import accuracy_of, pretrained, searched, statistics_anew, train
from conftest import HELPERS, model_of, same, same_state
from tiny_runs import write_file

from nni_jackpot import apply_masks
from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.data.loading import EpochShuffle, load_data
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.folder.pretrained import load_weights
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.masks import load_masks


@pytest.mark.honours("DistributedDataParallel", "resume")
def test_a_run_by_two_processes(tmp_path: Path) -> None:
    config_file = write_file(
        tmp_path,
        data={"train_images": None, "eval_batch_size": 359},  # one image in the last batch
        model={"width": 6},
        pretrain={"epochs": 3},
        search={"init": "snip", "checkpoint_every": 7},
    )
    run = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(HELPERS / "two_processes.py"),
    ]
    process = subprocess.run([sys.executable, *run, str(config_file)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for rank in (0, 1):
        assert f"process {rank}: [0, 0, 2, 2]" in process.stderr
    # Only one of them says what it has found.
    assert process.stdout.count("no weight was changed") == 2
    assert (
        process.stderr.count("whole holds a finished run of other settings: search.epochs was 2 and is 3")
        == 2
    )
    assert "data.batch_size: found 63, allowed for 2 processes: multiples of 2, from 4" in process.stderr

    assert len(list((tmp_path / "cache").glob("*.pth"))) == 1
    whole, resumed = (load_result(tmp_path / name) for name in ("whole", "resumed"))
    assert resumed.resumed_step == 28
    assert resumed.rows == whole.rows
    assert [row.kind for row in whole.rows][-2:] == ["initial_tuned", "jackpot_tuned"]
    assert all(row.accuracy * 360 == pytest.approx(round(row.accuracy * 360)) for row in whole.rows)
    start, found, again = (
        load_masks(tmp_path / name) for name in ("whole/start.pth", "whole/masks.pth", "resumed/masks.pth")
    )
    zeros = total = 0
    for module, targets in found.items():
        assert torch.equal(targets["weight"], again[module]["weight"])
        assert "module." not in module
        zeros += int((targets["weight"] == 0).sum())
        total += targets["weight"].numel()
    assert zeros == int(0.8 * total)
    assert not same(start, found)

    # What two processes do, one can do by hand.
    config = load_config(config_file, {"output": str(tmp_path / "whole")})
    torch.manual_seed(config.seed)
    model = model_of(config)
    train(model, config, config.pretrain, processes=2)
    dense = pretrained(config)
    assert same_state(dense.state_dict(), model.state_dict())
    assert same(found, searched(config, processes=2, init=start))
    accuracies = [accuracy_of(dense, config, 2)]
    apply_masks(dense, start)
    accuracies.append(accuracy_of(dense, config, 2))
    statistics_anew(dense, config, 2)
    accuracies.append(accuracy_of(dense, config, 2))
    load_weights(dense, tmp_path / "whole" / "jackpot.pth")
    accuracies.append(accuracy_of(dense, config, 2))
    assert [row.accuracy for row in whole.rows[:4]] == accuracies


# -- what each gets of a batch


@pytest.mark.parametrize("size", [40, 41, 43, 44, 47])
def test_parts_of_a_batch_are_disjoint_and_of_one_size(size: int) -> None:
    whole = EpochShuffle(range(size), 8, seed=0)
    parts = [EpochShuffle(range(size), 8, seed=0, part=part, parts=2) for part in (0, 1)]
    for together, *shares in zip(whole, *parts):  # noqa: B905 - a last batch is left out where it is too small
        assert len(shares[0]) == len(shares[1])
        dealt = sorted(shares[0] + shares[1])
        assert set(dealt) <= set(together)
        assert len(dealt) == len(set(dealt)) == len(together) - len(together) % 2
    used = sum(part.sizes[i] for part in parts for i in range(len(part)))
    assert used == size - size % 8 + (size % 8 // 2 * 2 if size % 8 >= 4 else 0)
    assert [len(share) for share in parts[0]] == parts[0].sizes


def test_batches_that_cannot_be_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nni_jackpot.experiment.data.loading.world_size", lambda: 4)
    with pytest.raises(
        ExperimentConfigError, match="batch_size: found 6, allowed for 4 processes: multiples of 4, from 8"
    ):
        load_data(DataConfig(name="digits", batch_size=6), seed=0)
    with pytest.raises(ExperimentConfigError, match=r"found 4, .* from 8"):
        load_data(DataConfig(name="digits", batch_size=4), seed=0)
    assert load_data(DataConfig(name="digits", batch_size=8), seed=0).train.order.sizes[0] == 2
