"""Each deployment form computes what the masked network computes, or is refused with nothing written."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.errors import MaskError, OutputFolderError, SpeedupError
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.speedup import Deployment, Form, Jackpot, deploy, register_form
from nni_jackpot.speedup.forms.form import FORMS

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
ONE_BY_ONE: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.8}]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(depth=8, width=16, num_classes=10, in_channels=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def masks_of(model: nn.Module, config_list: list[dict[str, Any]]) -> Any:
    pruner = LotteryJackpotPruner(model, config_list)
    masks = pruner.get_masks()
    pruner.unwrap_model()
    return masks


def channel_masks(model: nn.Module) -> Any:
    """Return masks of half the inner channels, with the norms that follow."""
    masks: Any = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith(".conv1"):
            keep = torch.arange(module.out_channels) % 2
            norm = name.replace("conv1", "bn1")
            masks[name] = {"weight": keep.view(-1, 1, 1, 1).expand_as(module.weight).float().clone()}
            masks[norm] = {"weight": keep.float(), "bias": keep.float()}
    return masks


def expected(model: nn.Module, masks: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = apply_masks(copy.deepcopy(model), masks).eval()(x)
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def deployed(model: nn.Module, masks: Any, form: str | Form, path: Path, **options: Any) -> Deployment:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = deploy(model, masks, form, path, options.pop("example", X), seconds=0, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.path == path
    line = str(found)
    assert re.search(r": \S+, [\d,]+ -> [\d,]+ bytes, \S+ -> \S+ ms \(x \S+\), outputs equal ", line), line
    assert "\n" not in line
    return found


def test_a_smaller_network_runs_without_its_code(network: nn.Module, tmp_path: Path) -> None:
    masks = channel_masks(network)
    found = deployed(network, masks, "shrink", tmp_path / "new" / "small.pt2")
    assert found.bytes_after < found.bytes_before
    assert files(tmp_path / "new") == ["small.pt2"]
    program = torch.export.load(tmp_path / "new" / "small.pt2").module()
    for batch in (X[:1], X[:3]):
        torch.testing.assert_close(program(batch), expected(network, masks, batch), rtol=1e-3, atol=1e-4)


def test_sparse_matrices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 256))
    masks = masks_of(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.95}])
    x = torch.rand(2, 3, 8, 8)
    found = deployed(model, masks, "csr", tmp_path / "a.pt2", example=x)
    assert found.bytes_after < 0.3 * found.bytes_before
    x = torch.rand(5, 3, 8, 8)
    program = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(program(x), expected(model, masks, x), rtol=1e-3, atol=1e-4)


def test_onnx_and_int8(network: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    masks = masks_of(network, ONE_BY_ONE)
    whole = deployed(network, masks, "onnx", tmp_path / "a.onnx")
    small = deployed(network, masks, "int8", tmp_path / "b.onnx", batches=[torch.rand(64, 1, 8, 8)])
    assert small.bytes_after < whole.bytes_after / 2
    assert files(tmp_path) == ["a.onnx", "b.onnx"]


def test_a_folder_that_from_pretrained_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    masks = masks_of(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    example = {"input_ids": torch.tensor([[1, 2, 3]])}
    found = deployed(model, masks, "hf", tmp_path / "bert", example=example)
    assert found.difference == 0
    assert "outputs equal bit for bit" in str(found)
    read = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
    for name, tensor in apply_masks(model, masks).state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("shrink", "the masks contain no channel that ModelSpeedup can remove"),
        ("csr", "the masks prune no linear layer and no 1x1 convolution"),
        ("2:4", "the masks prune no linear layer and no 1x1 convolution with multiples of 32"),
        ("int8", "int8 needs batches"),
        ("hf", "hf is for networks of transformers"),
    ],
)
def test_what_a_form_cannot_take_is_refused(
    form: str, words: str, network: nn.Module, tmp_path: Path
) -> None:
    if form == "int8":
        pytest.importorskip("onnxruntime")
    masks = masks_of(network, [{"op_names": ["stage1.0.conv1"], "sparse_ratio": 0.5}])
    with pytest.raises((MaskError, SpeedupError), match=re.escape(words)):
        deploy(network, masks, form, tmp_path / "new" / "it", X, seconds=0)
    assert not files(tmp_path)


def test_two_of_four_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Linear(64, 32)
    masks = masks_of(model, [{"op_types": ["Linear"], "sparse_pattern": "2:4"}])
    with pytest.raises(SpeedupError, match=r"on cpu, and 2:4 needs a CUDA GPU of compute capability 8\.0"):
        deploy(model, masks, "2:4", tmp_path / "new" / "it", torch.rand(3, 64))
    assert not files(tmp_path)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU"
)
def test_two_of_four(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    masks = masks_of(model, [{"op_types": ["Linear"], "sparse_pattern": "2:4"}])
    deployed(model, masks, "2:4", tmp_path / "it.safetensors", example=torch.rand(64, 256))
    assert files(tmp_path) == ["it.safetensors"]


def test_masks_of_another_network_and_other_names(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"the model has no parameter head\.weight"):
        deploy(network, {"head": {"weight": torch.zeros(2, 2)}}, "onnx", tmp_path / "it", X)
    with pytest.raises(ValueError, match=r"deployment form must be one of .*onnx.*; did you mean onnx"):
        deploy(network, {}, "onx", tmp_path / "it", X)
    assert not files(tmp_path)


class _Wrong(Form):
    """Computes something else."""

    suffix = ".bin"

    def write(self, jackpot: Jackpot, path: Path) -> None:
        path.write_bytes(b"123")

    def load(self, path: Path, jackpot: Jackpot) -> Any:
        return lambda x: jackpot.model(x) + 1


def test_a_form_that_computes_something_else_is_not_written(network: nn.Module, tmp_path: Path) -> None:
    masks = masks_of(network, ONE_BY_ONE)
    path = tmp_path / "it.bin"
    path.write_bytes(b"before")
    with pytest.raises(SpeedupError, match="_Wrong differs from the masked model by"):
        deploy(network, masks, _Wrong(), path, X)
    assert path.read_bytes() == b"before"
    assert files(tmp_path) == ["it.bin"]
    with pytest.raises(OutputFolderError, match="is a folder"):
        deploy(network, masks, _Wrong(), tmp_path, X)


def test_names_of_forms() -> None:
    assert {"onnx", "int8", "shrink", "csr", "2:4", "hf"} <= set(FORMS)
    with pytest.raises(ValueError, match="the name of a deployment form must match"):
        register_form("../x")(_Wrong)
    with pytest.raises(ValueError, match="'onnx' is registered already"):
        register_form("onnx")(_Wrong)
