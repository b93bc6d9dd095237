"""A model's inputs may be a tensor, a tuple, a list or a dict, nested as the model requires."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_speedup import masked
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.errors import SpeedupError
from nni_jackpot.speedup import export_onnx, quantize_onnx, shrink, sparse_csr
from nni_jackpot.speedup.calls import Call
from nni_jackpot.speedup.outputs import check_same, outputs_of

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 4, generator=GENERATOR), torch.randn(2, 3, generator=GENERATOR)


class Net(nn.Module):
    """A model whose masked channels can be removed, with inputs of any form."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def of(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))) + y


class Two(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.of(x, y)


class ByKeyword(Net):
    def forward(self, *, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        return {"out": self.of(x, y) * scale}


class Optional(Net):
    def forward(self, x: Tensor | None = None, z: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        assert x is not None
        assert y is not None
        return self.of(x if z is None else x + z, y)


class AnyNumber(Net):
    def forward(self, *tensors: Tensor) -> Tensor:
        return self.of(*tensors)


class AnyKeyword(Net):
    def forward(self, **tensors: Tensor) -> Tensor:
        return self.of(tensors["x"], tensors["y"])


class OfList(Net):
    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.of(tensors[0], tensors[1]), [tensors[1] * 2]


class OfDict(Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.of(batch["x"], batch["y"])


class Nested(Net):
    def forward(self, batch: dict[str, Any], scale: Tensor) -> Tensor:
        return self.of(batch["parts"][0]["x"], batch["parts"][1][0]) * scale


class InPlace(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += 1
        return self.of(x, y)


class Moving(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return self.of(x.to(device), y.to(device))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


CASES: dict[str, tuple[type[Net], Any]] = {
    "tuple": (Two, (X, Y)),
    "list": (Two, [X, Y]),
    "named tuple": (Two, Pair(X, Y)),
    "dict": (Two, {"x": X, "y": Y}),
    "dict in another order": (Two, {"y": Y, "x": X}),
    "ordered dict": (Two, OrderedDict(y=Y, x=X)),
    "mapping": (Two, UserDict({"y": Y, "x": X})),
    "keyword-only": (ByKeyword, {"y": Y, "x": X}),
    "with a number": (ByKeyword, {"x": X, "y": Y, "scale": 3.0}),
    "with None": (Optional, (X, None, Y)),
    "with a gap": (Optional, {"y": Y, "x": X}),
    "any number": (AnyNumber, [X, Y]),
    "any keyword": (AnyKeyword, {"x": X, "y": Y}),
    "list as one argument": (OfList, [X, Y]),
    "list in a tuple": (OfList, ([X, Y],)),
    "dict as one argument": (OfDict, {"y": Y, "x": X}),
    "dict in a tuple": (OfDict, ({"x": X, "y": Y},)),
    "nested": (Nested, ({"parts": [{"x": X}, (Y,)]}, torch.tensor(2.0))),
    "changed in place": (InPlace, (X.clone(), Y.clone())),
    "moved": (Moving, {"y": Y, "x": X}),
}
KEPT = torch.tensor([1.0, 0] * 4)
MASKS = {"up": {"weight": KEPT[:, None].expand(8, 4).clone(), "bias": KEPT}}

cases = pytest.mark.parametrize("name", CASES)


def made(name: str) -> tuple[Net, Any]:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    return make(), inputs


def same(model: nn.Module, form: nn.Module, inputs: Any) -> None:
    call = Call.to(model, inputs)
    check_same(outputs_of(masked(model, MASKS), call), outputs_of(copy.deepcopy(form), call), "it")


@cases
def test_channels_are_taken_out(name: str) -> None:
    model, inputs = made(name)
    small = shrink(model, MASKS, inputs)
    assert small.up.weight.shape == (4, 4)
    assert small.down.weight.shape == (3, 4)
    same(model, small, inputs)
    assert torch.equal(X, CASES["tuple"][1][0])


@cases
def test_sparse_layers_are_tried(name: str) -> None:
    model, inputs = made(name)
    same(model, sparse_csr(model, MASKS, inputs), inputs)


EXPORTED = ["dict in another order", "mapping", "with None", "any number", "list in a tuple", "nested"]


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_files_take_them(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = made(name)
    export_onnx(model, tmp_path / "model.onnx", inputs)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # More rows than exported, by input names.
    tensors = {node.name: Y if node.shape[-1:] == [3] else X for node in session.get_inputs() if node.shape}
    scalars = {node.name: torch.tensor(2.0) for node in session.get_inputs() if not node.shape}
    feed = {key: tensor.repeat(3, 1) for key, tensor in tensors.items()} | scalars
    found = torch.from_numpy(session.run(None, {key: tensor.numpy() for key, tensor in feed.items()})[0])
    expected = outputs_of(model.eval(), Call.to(model, inputs))[0]
    torch.testing.assert_close(found, expected.repeat(3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Two, OfDict])
def test_batches_are_calibrated_by_name(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_onnx(make(), tmp_path / "model.onnx", {"x": X, "y": Y})

    def calibrated(batch: Any) -> bytes:
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [batch])
        return (tmp_path / "int8.onnx").read_bytes()

    assert (
        calibrated({"y": Y * 100, "x": X}) == calibrated({"x": X, "y": Y * 100}) == calibrated([X, Y * 100])
    )
    for wrong in ({"x": X}, {"x": X, "z": Y}, (X,)):
        with pytest.raises(SpeedupError, match="cannot quantize"):
            calibrated(wrong)


def test_what_has_no_rows_is_no_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Mixing(Two):
        def forward(self, x: Tensor, y: Tensor, mix: Tensor) -> Tensor:
            return super().forward(x, y) @ mix

    export_onnx(Mixing(), tmp_path / "model.onnx", {"mix": torch.eye(3), "x": X, "y": Y})
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {node.name: node.shape for node in session.get_inputs()}
    assert shapes["mix"] == [3, 3]
