from __future__ import annotations

import dis
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from nni.common.concrete_trace_utils import concrete_proxy, concrete_trace, concrete_tracer
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import nni_compat


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)


def test_import_prints_nothing() -> None:
    result = run("import nni_jackpot, warnings; print(len(warnings.filters))")
    plain = run("import torch, nni, warnings; print(len(warnings.filters))")
    assert result.stderr == ""
    assert result.stdout == plain.stdout  # the user's filters are theirs


def test_apply_is_idempotent() -> None:
    before = (
        concrete_tracer.node_is_impure_wrapper,
        concrete_proxy.dis,
        concrete_proxy.ConcreteProxy.jump_opcodes,
        len(concrete_tracer.ConcreteTracer.default_autowrap_leaf_function),
    )
    nni_compat.apply()
    for repair in nni_compat.REPAIRS:
        repair()
    after = (
        concrete_tracer.node_is_impure_wrapper,
        concrete_proxy.dis,
        concrete_proxy.ConcreteProxy.jump_opcodes,
        len(concrete_tracer.ConcreteTracer.default_autowrap_leaf_function),
    )
    assert after == before


class Branching(nn.Module):
    """Branches on a traced value, unpacks a traced tuple and slices a traced shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, _, _, _ = x.shape
        # as stochastic depth and inception do
        if x.shape[1] == 4 and not x.dim() < 4:
            x = F.adaptive_avg_pool2d(F.dropout(x, 0.0, self.training), 1)
        return self.fc(x.reshape(batch, x.shape[1:].numel()))


def test_branches_and_unpacking_are_traced() -> None:
    model = Branching().eval()
    x = torch.randn(2, 3, 8, 8)
    traced = concrete_trace(model, {"x": x})
    assert torch.allclose(traced(x), model(x))


@pytest.mark.parametrize("offset", range(0, 200, 2))
def test_instructions_are_found_at_their_offset(offset: int) -> None:
    code = Branching.forward.__code__
    found = list(concrete_proxy.dis.get_instructions(code))
    exact = {instruction.offset: instruction for instruction in dis.get_instructions(code)}
    if offset in exact:
        assert found[offset // 2] == exact[offset]


def test_tracer_wraps_no_function_without_module() -> None:
    wrapped = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    assert all(getattr(function, "__module__", "") is not None for function in wrapped)


def test_is_impure_takes_the_arguments_that_torch_fx_passes() -> None:
    graph = torch.fx.symbolic_trace(nn.ReLU()).graph
    for node in graph.nodes:
        expected = node.op in ("placeholder", "output")
        assert concrete_tracer.node_is_impure_wrapper(node, True) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="NNI's own code fits Python 3.10")
def test_the_quick_start_fails_without_us() -> None:
    code = """
import torch, torchvision
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
{}
model = torchvision.models.resnet18(num_classes=10)
pruner = L1NormPruner(model, [{{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}}])
_, masks = pruner.compress()
pruner.unwrap_model()
ModelSpeedup(model, torch.randn(2, 3, 32, 32), masks).speedup_model()
print(sum(p.numel() for p in model.parameters()))
"""
    assert run(code.format("")).returncode != 0
    mended = run(code.format("import nni_jackpot"))
    assert mended.returncode == 0, mended.stderr
    assert int(mended.stdout.split()[-1]) < 6_000_000


def speedup(model: nn.Module, size: int, masks_file: Path | None = None) -> tuple[float, Tensor, Tensor]:
    """Prune half of the channels; return the share of parameters left and the outputs before and after."""
    torch.manual_seed(0)
    model.eval()
    x = torch.randn(4, 3, size, size)
    total = sum(p.numel() for p in model.parameters())
    config_list = [{"op_types": ["Conv2d"], "exclude_op_names": ["classifier.1"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    before = model(x).detach()
    pruner.unwrap_model()
    if masks_file is not None:
        torch.save({module: dict(targets) for module, targets in masks.items()}, masks_file)
    ModelSpeedup(model, x, masks if masks_file is None else str(masks_file)).speedup_model()
    after = model(x)
    after.sum().backward()
    return sum(p.numel() for p in model.parameters()) / total, before, after.detach()


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (torchvision.models.resnet18, 32),
        (torchvision.models.mobilenet_v2, 32),
        (torchvision.models.densenet121, 32),
        (torchvision.models.efficientnet_b0, 32),
        (lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False), 32),
        (lambda: torchvision.models.inception_v3(aux_logits=False, init_weights=False), 96),
    ],
    ids=["resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"],
)  # fmt: skip
def test_torchvision_models_shrink(make: Callable[[], nn.Module], size: int) -> None:
    left, _, after = speedup(make(), size)
    assert left < 0.7
    assert after.isfinite().all()


def test_the_small_model_predicts_what_the_masked_one_does(tmp_path: Path) -> None:
    left, before, after = speedup(torchvision.models.squeezenet1_1(), 48, tmp_path / "masks.pth")
    assert left < 0.5
    assert torch.allclose(before, after, atol=1e-5)
