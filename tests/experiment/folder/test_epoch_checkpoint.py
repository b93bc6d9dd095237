"""An interrupted training resumes from its file, or is refused with one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_jackpot.errors import CheckpointError
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.runtime.resume import check_state


@pytest.fixture
def file(tmp_path: Path) -> EpochFile:
    file = EpochFile(tmp_path / "epoch.pth", {"data.name": "digits", "lr": 0.1, "weights": "abc"})
    file.save(3, {"model": nn.Linear(2, 2)})
    return file


def test_parts_and_random_states_are_where_they_were(file: EpochFile) -> None:
    drawn = torch.rand(3)
    model = nn.Linear(2, 2)
    assert file.load({"model": model}) == 3
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("key", ["epochs", "parts", "random"])
@pytest.mark.parametrize("value", [None, [], {}, {"model": {}}, [{}], [{"torch": b"1"}]], ids=repr)
def test_what_was_tampered_with_is_refused(file: EpochFile, key: str, value: Any) -> None:
    saved = torch.load(file.path)
    saved[key] = value
    torch.save(saved, file.path)
    with pytest.raises(CheckpointError, match=r"epoch\.pth is damaged: .") as caught:
        file.load({"model": nn.Linear(2, 2)})
    assert "\n" not in str(caught.value)


def test_what_is_known_so_far_is_compared(file: EpochFile, tmp_path: Path) -> None:
    check_state(tmp_path / "none.pth", "training", {})
    check_state(file.path, "training", {"lr": 0.1, "data.name": "digits"})
    with pytest.raises(CheckpointError, match=r"another training: lr was 0\.1 and is 0\.2\. Remove it"):
        check_state(file.path, "training", {"lr": 0.2, "data.name": "digits"})
    with pytest.raises(CheckpointError, match=r"data\.name was 'digits' and is None"):
        check_state(file.path, "training", {"lr": 0.1})  # a setting less
    file.path.write_text("nonsense")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a training"):
        check_state(file.path, "training", {})
