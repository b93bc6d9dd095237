from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_masks, mask_overlap, save_masks
from nni_jackpot.errors import CheckpointError, MaskError, OutputFolderError
from nni_jackpot.masks import densities, sparsity_of

A = {
    "conv": {"weight": torch.tensor([1.0, 1.0, 0.0, 0.0]), "bias": torch.ones(2)},
    "fc": {"weight": torch.eye(2)},
}
B = {
    "conv": {"weight": torch.tensor([1.0, 0.0, 1.0, 0.0]), "bias": torch.ones(2)},
    "fc": {"weight": torch.eye(2)},
}


def test_overlap_is_eq_7_per_target_and_in_total() -> None:
    overlap = mask_overlap(A, B)
    assert overlap.per_target == {"conv.weight": 0.5, "fc.weight": 1.0}
    assert overlap.total == 6 / 8
    assert mask_overlap(A, A).total == 1.0


def test_overlap_refuses_masks_of_different_targets() -> None:
    with pytest.raises(MaskError, match=r"fc\.weight"):
        mask_overlap(A, {"conv": B["conv"]})
    with pytest.raises(MaskError, match=r"conv\.weight .*\(4,\) and \(3,\)"):
        mask_overlap(A, {**B, "conv": {"weight": torch.ones(3), "bias": torch.ones(2)}})


def test_densities() -> None:
    assert densities(A) == {"conv.weight": 0.5, "conv.bias": 1.0, "fc.weight": 0.5}


def test_sparsity_counts_pruned_targets_only() -> None:
    assert sparsity_of(A) == 0.5
    assert sparsity_of({"conv": {"bias": torch.ones(2), "weight": None}}) == 0.0


def test_save_and_load(tmp_path: Path) -> None:
    masks = {"conv": {"weight": torch.eye(3), "bias": None}}
    save_masks(masks, tmp_path / "deep" / "masks.pth")
    loaded = load_masks(tmp_path / "deep" / "masks.pth")
    assert torch.equal(loaded["conv"]["weight"], torch.eye(3))
    assert loaded["conv"]["bias"] is None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["masks.pth"]


def test_masks_saved_by_nni_users_load(tmp_path: Path) -> None:
    masks = collections.defaultdict(dict)
    masks["conv"]["weight"] = torch.eye(3)
    torch.save(masks, tmp_path / "masks.pth")
    assert torch.equal(load_masks(tmp_path / "masks.pth")["conv"]["weight"], torch.eye(3))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no mask file"):
        load_masks(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pth")
    for name in ("text", "empty", "weights"):
        with pytest.raises(CheckpointError, match=name):
            load_masks(tmp_path / f"{name}.pth")


def test_no_code_of_a_mask_file_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv": {"weight": Evil()}}))
    torch.save({"conv": {"weight": Evil()}}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(CheckpointError):
            load_masks(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"cannot write .*masks\.pth"):
        save_masks(A, tmp_path / "file" / "masks.pth")


def test_apply_masks_writes_zeros_and_leaves_the_rest(model: nn.Module) -> None:
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = pruner.get_masks()
    with pytest.raises(MaskError, match="unwrap_model"):
        apply_masks(model, masks)
    pruner.unwrap_model()
    assert apply_masks(model, masks) is model
    for name, value in model.state_dict().items():
        module, _, target = name.rpartition(".")
        mask = masks.get(module, {}).get(target)
        assert torch.equal(value, dense[name] if mask is None else dense[name] * mask)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_apply_masks_changes_nothing_when_one_mask_does_not_fit(model: nn.Module) -> None:
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    good = {"weight": torch.zeros_like(model.conv1.weight)}
    with pytest.raises(MaskError, match=r"no parameter nowhere\.weight"):
        apply_masks(model, {"conv1": good, "nowhere": {"weight": torch.ones(1)}})
    with pytest.raises(MaskError, match=r"conv2\.weight has shape \(1,\)"):
        apply_masks(model, {"conv1": good, "conv2": {"weight": torch.ones(1)}})
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
