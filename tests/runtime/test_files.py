from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nni_jackpot.errors import CheckpointError, OutputFolderError
from nni_jackpot.runtime.files import load_state_dict, load_tensors, replace_file


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    replace_file(path, lambda temporary: temporary.write_text("old"))

    def fail_half_way(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OutputFolderError, match=r"cannot write .*file\.txt: disk full"):
        replace_file(path, fail_half_way)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path) -> None:
    def interrupted(temporary: Path) -> None:
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file.txt", interrupted)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no ticket .*none\.pth"):
        load_tensors(tmp_path / "none.pth", "ticket")
    (tmp_path / "cut.pth").write_bytes(b"")
    torch.save(torch.ones(1000), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:800])
    for name in ("cut.pth", "half.pth"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a ticket: .+"):
            load_tensors(tmp_path / name, "ticket")
    assert torch.equal(load_tensors(tmp_path / "whole.pth", "ticket"), torch.ones(1000))


def test_a_state_dict_is_tensors_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(2)}, path)
    assert torch.equal(load_state_dict(path)["weight"], torch.ones(2))
    for content in ([torch.ones(2)], {"epoch": 3}, {0: torch.ones(2)}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"weights\.pth is not a state dict: tensors by name"):
            load_state_dict(path)
