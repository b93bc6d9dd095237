from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIG_LIST, ConvNet
from torch import nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_sparse, save_sparse
from nni_jackpot.errors import MaskError, TicketError
from nni_jackpot.storage.formats.sealed import read_sealed, write_sealed
from nni_jackpot.storage.sparse_checkpoint import KIND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("applied", [True, False])
def test_the_sparse_model_comes_back(tmp_path: Path, dtype: torch.dtype, applied: bool) -> None:
    model = ConvNet().to(dtype)
    masks = {
        "conv1": {"weight": torch.ones(8, 1, 3, 3), "bias": None},
        "conv2": {"weight": torch.rand(12, 8, 3, 3) < 0.1, "_input_0": torch.zeros(8)},
        "fc": {"weight": (torch.rand(3, 1) < 0.5).expand(3, 12), "bias": torch.zeros(3)},
    }
    if applied:
        masks["conv2"].pop("_input_0")
        apply_masks(model, masks)
    save_sparse(tmp_path / "new" / "model.sparse", model, masks)
    state = load_sparse(tmp_path / "new" / "model.sparse")
    masks["conv2"].pop("_input_0", None)
    apply_masks(model, masks)
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    ConvNet().to(dtype).load_state_dict(state)


def test_kept_weights_and_half_a_bit(tmp_path: Path) -> None:
    model = nn.Linear(1000, 1000, bias=False)
    masks = {"": {"weight": torch.rand(1000, 1000) < 0.1}}
    save_sparse(tmp_path / "model.sparse", model, masks)
    kept = int(masks[""]["weight"].sum())
    assert (tmp_path / "model.sparse").stat().st_size < 4 * kept + 0.475 * 1e6 / 8 + 500
    before = model.weight.detach().clone()
    assert torch.equal(
        load_sparse(tmp_path / "model.sparse")["weight"][masks[""]["weight"]], before[masks[""]["weight"]]
    )


def test_tied_and_transposed_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[0].bias.data = torch.randn(4, 2)[:, 0]
    save_sparse(tmp_path / "model.sparse", model, {"1": {"bias": torch.zeros(4)}})
    state = load_sparse(tmp_path / "model.sparse")
    assert torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(state["1.weight"], model[0].weight)
    assert torch.equal(state["0.bias"], model[0].bias)


def test_masks_that_do_not_fit(tmp_path: Path, model: nn.Module) -> None:
    for masks in ({"fc": {"weight": torch.ones(2)}}, {"conv9": {"weight": torch.ones(2)}}):
        with pytest.raises(MaskError):
            save_sparse(tmp_path / "model.sparse", model, masks)
    LotteryJackpotPruner(model, CONFIG_LIST)
    with pytest.raises(MaskError, match="still wrapped"):
        save_sparse(tmp_path / "model.sparse", model, {})
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "model.sparse"
    save_sparse(path, model, {"fc": {"weight": torch.rand(3, 12) < 0.5}})
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(TicketError):
        load_sparse(path)
    path.write_bytes(raw)

    def edited(change) -> None:
        content, tensors = read_sealed(path, KIND, 1)
        change(content, tensors)
        write_sealed(path, KIND, 1, content, tensors)
        with pytest.raises(TicketError, match="is damaged"):
            load_sparse(path)
        path.write_bytes(raw)

    edited(lambda content, tensors: content["fc.weight"].update(ones=content["fc.weight"]["ones"] + 1))
    edited(lambda content, tensors: content["fc.weight"].update(shape=[1 << 40, 1 << 40]))
    edited(lambda content, tensors: tensors.update({"kept.fc.weight": tensors["kept.fc.weight"][1:]}))
    edited(lambda content, tensors: tensors.pop("mask.fc.weight"))
    edited(lambda content, tensors: content.update({"fc.weight": 3}))
    edited(lambda content, tensors: content.update({"more": None}))
