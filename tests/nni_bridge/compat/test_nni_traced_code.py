"""Python code that NNI's tracer can follow: classes used as such, annotations, imports, loops."""

from __future__ import annotations

import builtins
import importlib
import sys
from pathlib import Path

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from torch import nn
from traced_networks import check_traced, image, network

import nni_jackpot  # noqa: F401

# Of a network whose conv gives a feature map of (8, 4, 8, 8).
FORWARDS = {
    "annotations of builtin classes": """
        def forward(self, x: torch.Tensor, sizes: list[int] | None = None) -> tuple[torch.Tensor, dict[str, int]]:
            x = self.conv(x)
            return torch.relu(x), {"a": x}
    """,
    "an annotation of a class or None": """
        def forward(self, x: torch.Tensor, size: int | None = None, kind: type[nn.Module] | None = None):
            return torch.relu(self.conv(x))
    """,
    "a function inside": """
        def forward(self, x):
            def scale(y, by: int | float, sizes: list[int]) -> tuple[int, ...]:
                return y * by
            return scale(self.conv(x), 2, [1])
    """,
    "cast and annotate": """
        def forward(self, x):
            x = cast(list[torch.Tensor], [self.conv(x)])
            sizes = torch.jit.annotate(dict[str, int], {})
            return x[0] * cast("int | None", 2)
    """,
    "isinstance of a union": """
        def forward(self, x):
            x = (self.conv(x), 2)
            if isinstance(x, list | tuple) and not isinstance(x[0], int | float):
                return x[0] * x[1]
            return x
    """,
    "isinstance of nested tuples": """
        def forward(self, x):
            x = (self.conv(x), 2)
            if isinstance(x, (str, (list, tuple))):
                return x[0] * x[1]
            return x
    """,
    "isinstance of a list": """
        def forward(self, x):
            x = [self.conv(x), self.conv(x)]
            if isinstance(x, list):
                x = torch.cat(x, 1)
            if isinstance(x, (list, tuple)):
                return x[0]
            return x
    """,
    "the type compared": """
        def forward(self, x):
            x = [self.conv(x), 2]
            if type(x) == list and type(x) in (list, tuple):
                return x[0] * x[1]
            return x[0]
    """,
    "a generic class called": """
        def forward(self, x):
            return self.conv(x) * list[int](x.shape[2:])[0]
    """,
    "methods and names of classes": """
        def forward(self, x):
            names = dict.fromkeys(["a", "b"], 1)
            by = int.from_bytes(b"\\x02", "big") + len(list.__name__) + len(torch.Size.__name__)
            return self.conv(x) * names["a"] * by
    """,
    "a class made inside": """
        def forward(self, x):
            class Box(dict):
                pass
            return self.conv(x) * len(Box(a=1)) * issubclass(Box, dict)
    """,
    "lists and tuples of parts": """
        def forward(self, x):
            x = self.conv(x)
            parts = list(torch.split(x, 2, dim=1)) + list(x.chunk(2, 1))
            return torch.cat(tuple(parts[::-1]) + (x,), 1), torch.stack([*x.split(2, 1)])
    """,
    "zip and enumerate": """
        def forward(self, x):
            x = self.conv(x)
            total = 0
            for i, (a, b) in enumerate(zip(x.split(2, 1), x.chunk(2, 1))):
                total = total + a * b * i
            for a, b in zip([x, x + 1], [1, 2]):
                total = total + a.sum() * b
            return total
    """,
    "map, reversed, min and max": """
        def forward(self, x):
            a, b = map(torch.relu, torch.chunk(self.conv(x), 2, 1))
            first, last = reversed([a, b])
            return first[:, : min(3, a.shape[1])] * max(b.shape) + last
    """,
    "arithmetic of sizes": """
        def forward(self, x):
            x = self.conv(x)
            b, c, h, w = x.size()
            flat = x.view(b, c, h * w)
            return flat.reshape(x.size()[:2] + (-1,)).reshape(*x.shape[:2], -1).reshape(tuple(x.shape[:2]) + (4, -1))
    """,
    "lists of sizes": """
        def forward(self, x):
            x = self.conv(x)
            size = list(x.shape[-2:])
            x = F.interpolate(x, size=[side * 2 for side in size])
            return x.view(torch.Size([x.shape[0], -1])) / x.shape[1:].numel()
    """,
    "whole numbers": """
        def forward(self, x):
            x = self.conv(x)
            return x[:, :, : math.ceil(x.shape[2] / 2), : int(x.shape[3] / 2)]
    """,
    "a dict": """
        def forward(self, x):
            x = self.conv(x)
            found = {"out": x, "aux": F.max_pool2d(x, 2)}
            return {name: tensor + 1 for name, tensor in found.items()}, dict(out=x)
    """,
    "an ordered dict and a named tuple": """
        def forward(self, x):
            x = self.conv(x)
            found = OrderedDict()
            found["out"] = F.max_pool2d(x, 2)
            return found, Pair(x, x + 1)
    """,
    "an import": """
        def forward(self, x):
            import imported_late
            from imported_late import two
            return self.conv(x) * imported_late.two * two * imported_late.SCALE
    """,
    "an import by name": """
        def forward(self, x):
            late = importlib.import_module("imported_late")
            return self.conv(x) * late.two * late.SCALE
    """,
    "functions by other ways": """
        def forward(self, x):
            pool = functools.partial(F.max_pool2d, kernel_size=2)
            return pool(getattr(F, "max_pool2d")(super().forward(x), 2))
    """,
    "what PyTorch says of itself": """
        def forward(self, x):
            if torch.jit.is_scripting() or torch.compiler.is_compiling():
                return x
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                x = self.conv(x)
            return x.masked_fill(x > 0, torch.finfo(x.dtype).min)
    """,
    "norms": """
        def forward(self, x):
            x = self.conv(x)
            return F.normalize(x) + x / x.norm(dim=1, keepdim=True) + torch.norm(x, dim=(2, 3), keepdim=True)
    """,
}

# Code that NNI's tracer cannot follow with any PyTorch or Python: forward and reason.
LIMITS = {
    "set": (
        """
        def forward(self, x):
            return self.conv(x) if x.dim() in {3, 4} else x
        """,
        "torch.fx has no node for a set as an argument",
    ),
    "dict of zip": (
        """
        def forward(self, x):
            return dict(zip(["a"], [self.conv(x)]))["a"]
        """,
        "a zip of proxies is a proxy, for a dict to read as a mapping",
    ),
    "lambda": (
        """
        def forward(self, x):
            pool = lambda y: F.max_pool2d(y, 2)
            return pool(self.conv(x))
        """,
        "operator_patcher.py reads the source of a function, of which a lambda's line is no more than a part",
    ),
    "type": (
        """
        def forward(self, x):
            return self.conv(x) * type("Two", (), {"two": 2}).two
        """,
        "the tracer's type() takes one argument",
    ),
    "values": (
        """
        def forward(self, x):
            return self.conv(x).max(dim=1).values + 1
        """,
        "a proxy has a method values() of its own, for dicts",
    ),
}

LATE = """
import collections
import dataclasses
import enum
import typing

import torch


class Box(dict):
    def one(self, x: list[int] | None) -> int | None:
        return None


class Pair(typing.NamedTuple):
    a: int


@dataclasses.dataclass
class Sizes:
    sizes: list[int]


class Kind(enum.Enum):
    A = 1


class Meta(type):
    pass


class OfMeta(list[int], metaclass=Meta):
    pass


Named = collections.namedtuple("Named", "a b")
SCALE = torch.tensor(3.0)
two = Pair(2).a
assert type(two) is int and isinstance(Box, type) and type(SCALE) is torch.Tensor
"""


@pytest.fixture(autouse=True)
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a module that only the tracer imports."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "imported_late.py").write_text(LATE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path / "late")
    monkeypatch.delitem(sys.modules, "imported_late", raising=False)


@pytest.mark.parametrize("what", FORWARDS)
def test_the_tracer_follows(tmp_path: Path, what: str) -> None:
    model = network(tmp_path, FORWARDS[what])
    x = image()
    traced = concrete_trace(model, (x,))  # before the network itself has imported anything
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("what", LIMITS)
def test_what_cannot_be_followed_is_known(tmp_path: Path, what: str) -> None:
    forward, _reason = LIMITS[what]
    model = network(tmp_path, forward)
    with pytest.raises((NotImplementedError, AttributeError, TypeError)):
        check_traced(model)


def test_a_name_for_type_checkers_alone_is_not_looked_up(tmp_path: Path) -> None:
    (tmp_path / "network_of_today.py").write_text(
        """
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from somewhere import Image


class Network(nn.Conv2d):
    def forward(self, x: Image, sizes: list[Image] | None = None) -> Image | None:
        def scaled(y: Image) -> Image:
            return 2 * y

        return scaled(torch.relu(super().forward(x)))
""",
        "utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        check_traced(importlib.import_module("network_of_today").Network(3, 4, 3))


def test_python_has_its_own_builtins_again() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such network")

    before = dict(vars(builtins))
    importer = importlib.import_module
    concrete_trace(nn.Sequential(nn.Conv2d(3, 4, 3)), (image(),))
    with pytest.raises(RuntimeError, match="no such network"):
        concrete_trace(Failing(), (image(),))
    assert dict(vars(builtins)) == before
    assert importlib.import_module is importer
