"""An ONNX file gives the model's outputs, or is not written."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet
from test_speedup import X, masks_of, state, unchanged
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.errors import MissingLibraryError, OutputFolderError, SpeedupError
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.runtime.extras import install_command
from nni_jackpot.speedup import export_onnx, quantize_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_same_in_onnxruntime(model: nn.Module, tmp_path: Path, batch: int) -> None:
    masks = masks_of(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.7}])
    plain = apply_masks(model, masks).train()
    before = state(plain)
    export_onnx(plain, tmp_path / "new" / "model.onnx", X[:batch])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert plain.training
    assert unchanged(plain, before)
    with torch.no_grad():
        expected = plain.eval()(X)
    torch.testing.assert_close(run(tmp_path / "new" / "model.onnx", X), expected)


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"sum": super().forward(x) + y, "rest": (x * 2, [y])}

    export_onnx(Two(4, 3), tmp_path / "two.onnx", (torch.randn(1, 4), torch.randn(1, 3)))
    assert (tmp_path / "two.onnx").exists()


def test_large_weights_are_beside_it(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    export_onnx(model, tmp_path / "model.onnx", X)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    torch.testing.assert_close(run(tmp_path / "model.onnx", X), model.eval()(X).detach())


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    class Branching(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(SpeedupError, match=r"export the model: .*data-dependent.*"):
        export_onnx(Branching(), tmp_path / "model.onnx", X)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_what_computes_something_else_leaves_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export
    other = copy.deepcopy(model).eval()
    other.fc.weight.data[0, 0] += 1
    monkeypatch.setattr(torch.onnx, "export", lambda model, *args, **kwargs: export(other, *args, **kwargs))
    with pytest.raises(SpeedupError, match="the ONNX file in onnxruntime differs"):
        export_onnx(model, tmp_path / "model.onnx", X)
    assert not list(tmp_path.iterdir())


def test_bad_input(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"cannot write .*model\.onnx"):
        export_onnx(model, tmp_path / "file" / "model.onnx", X)
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.7}])
    with pytest.raises(SpeedupError, match="still wrapped"):
        export_onnx(model, tmp_path / "model.onnx", X)
    pruner.unwrap_model()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingLibraryError, match=rf"onnxscript .*: {re.escape(install_command('deploy'))}$"):
        export_onnx(model, tmp_path / "model.onnx", X)


def test_int8_keeps_zeros(batches: Batches, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNet(depth=8, width=16, num_classes=3, in_channels=1)
    masks = masks_of(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}])
    apply_masks(model, masks)
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        model(images)  # norm statistics
    export_onnx(model, tmp_path / "model.onnx", images[:2])
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", images.split(16))
    names = ["int8.onnx", "model.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    small, large = ((tmp_path / name).stat().st_size for name in names)
    assert small < 0.5 * large
    found, expected = (run(tmp_path / name, images) for name in names)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in tensors if len(tensor.dims) == 4]
    assert {weight.dtype.name for weight in weights} == {"int8"}
    zeros = sum(int((mask["weight"] == 0).sum()) for mask in masks.values())
    assert sum(int((weight == 0).sum()) for weight in weights) >= zeros


def test_int8_of_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("none")
    with pytest.raises(SpeedupError, match=r"onnxruntime cannot quantize .*model\.onnx"):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [X])
    assert not (tmp_path / "int8.onnx").exists()
