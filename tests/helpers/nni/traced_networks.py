"""Networks generated as source code, which NNI's tracer reads; not a test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import torch
from nni.common.concrete_trace_utils import concrete_trace
from torch import Tensor, nn

# No import of annotations from __future__: these networks' annotations are evaluated.
BASE = """
import functools
import importlib
import math
from collections import OrderedDict
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import torchvision.ops as O
from torch import nn


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("y", torch.tensor([0, 1] * 4))
        self.register_buffer("samples2", torch.rand(8, 4, 2))
        self.register_buffer("samples3", torch.rand(8, 4, 3))
        self.register_buffer("theta", torch.eye(2, 3).repeat(8, 1, 1))
        self.register_buffer("rois", torch.tensor([[0.0, 1, 1, 6, 6], [1, 2, 2, 7, 7]]))

    def forward(self, x):
        return self.conv(x)
"""
# Names of the feature map in other shapes, for expressions.
SHAPES = {
    "v": "x.flatten(2)",
    "t": "x.mean((2, 3))",
    "u": "torch.stack([x, x + 1, x * 2], 2)",
    "a": "x.flatten(2)[0, :, :4].abs().cumsum(1)",
    "b": "x.flatten(2)[1, :, :4].abs().cumsum(1)",
}


def image() -> Tensor:
    return torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def network(folder: Path, forward: str, layers: Sequence[str] = ()) -> nn.Module:
    """Write and import a network with this method ``forward``, and with attributes ``layer0``, ``layer1``..."""
    made = [f"self.layer{i} = {layer}" for i, layer in enumerate(layers)]
    for name in sorted(set(re.findall(r"self\.([wb]\d+)\b", forward))):
        made.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(name[1:])}))")
    init = indent("\n".join(["def __init__(self):", "    super().__init__()", *indent_all(made)]), "    ")
    file = folder / "network.py"
    file.write_text(
        f"{BASE}\n\nclass Network(Base):\n{init}\n\n{indent(dedent(forward).strip(), '    ')}\n", "utf-8"
    )
    spec = spec_from_file_location("network", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Network().eval()


def indent_all(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def returning(expression: str) -> str:
    """Return a forward that evaluates an expression of the feature map."""
    shapes = [f"{name} = {shape}" for name, shape in SHAPES.items() if re.search(rf"\b{name}\b", expression)]
    return "\n".join(
        ["def forward(self, x):", *indent_all(["x = self.conv(x)", *shapes, f"return {expression}"])]
    )


def check_traced(model: nn.Module) -> Any:
    """Assert that the traced network gives the network's outputs; return the trace."""
    x = image()
    expected = model(x)
    traced = concrete_trace(model, (x,))
    torch.testing.assert_close(traced(x), expected, equal_nan=True)
    return traced
