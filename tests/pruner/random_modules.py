"""Small modules put together at random, from what has a weight and from what shares, nests or calls that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS = 8, 11


class Calls(nn.Module):
    """Apply a function of its layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for i, layer in enumerate(layers):
            self.add_module(f"layer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self._modules.values())


class Nested(nn.Module):
    """Holds a module as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Doubled(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _tied() -> nn.Module:
    first, second = linear(), linear()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh())


def _two_names() -> nn.Module:
    layer = linear()
    return Calls(lambda x, first, second: second(first(x).tanh()).tanh(), layer, layer)


def _attention() -> nn.Module:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return Calls(lambda x, layer: x + layer(x, x, x, need_weights=False)[0], attention)


def _over_channels(layer: nn.Module) -> nn.Module:
    """Have a layer take tokens of (N, L, C) as (N, C, L)."""
    return Calls(lambda x, layer: layer(x.mT).mT.tanh(), layer)


def _over_images(layer: nn.Module) -> nn.Module:
    """Have a layer take tokens of (N, L, C) as images of (N, C, L, 1)."""
    return Calls(lambda x, layer: layer(x.mT[..., None])[..., 0].mT.tanh(), layer)


# Each takes and returns (N, L, WIDTH).
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(linear(), nn.Tanh()),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "weight that is read": lambda: Calls(
        lambda x, layer: F.linear(x, layer.weight, layer.bias).tanh(), linear()
    ),
    "weight read both ways": lambda: Calls(lambda x, layer: (layer(x) @ layer.weight).tanh(), linear()),
    "tied": _tied,
    "two names": _two_names,
    "convolution": lambda: _over_channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "convolution by channel": lambda: _over_images(
        nn.Conv2d(WIDTH, WIDTH, (3, 1), padding=(1, 0), groups=WIDTH)
    ),
    "transposed convolution": lambda: _over_images(nn.ConvTranspose2d(WIDTH, WIDTH, 1)),
    "batch norm": lambda: _over_channels(nn.BatchNorm1d(WIDTH)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "attention": _attention,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "weight norm of a convolution": lambda: _over_channels(
        parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 1))
    ),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "parametrization without inverse": lambda: parametrize.register_parametrization(
        linear(), "weight", Doubled()
    ),
}

AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nested": Nested,
    "residual": lambda inner: Calls(lambda x, inner: x + inner(x), inner),
    "called three times": lambda inner: Calls(lambda x, inner: inner(inner(inner(x))), inner),
    "under two names": lambda inner: Calls(lambda x, first, second: second(x), inner, inner),
    "checkpointed": lambda inner: Calls(lambda x, inner: checkpoint(inner, x, use_reentrant=False), inner),
    "frozen": lambda inner: inner.requires_grad_(False),
}

Plan = str | tuple[str, list[Any]]
"""A layer by name, or what is around a list of plans."""


class Net(NamedTuple):
    """A plan of a whole network, which takes tokens if it has an embedding."""

    has_embedding: bool
    body: Plan
    head: str
    dtype: torch.dtype

    def make(self) -> nn.Module:
        """Make the network."""
        body = build(self.body)
        if not self.has_embedding:
            return nn.Sequential(body, nn.Linear(WIDTH, 5)).to(self.dtype)
        embedding, head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        if self.head == "tied":
            head.weight = embedding.weight
        if self.head == "read":
            reads = lambda x, embedding, body: F.linear(body(embedding(x)), embedding.weight)  # noqa: E731
            return Calls(reads, embedding, body).to(self.dtype)
        return nn.Sequential(embedding, body, head).to(self.dtype)

    def inputs(self) -> tuple[Tensor]:
        """Return inputs of four sequences of three tokens."""
        generator = torch.Generator().manual_seed(2)
        if self.has_embedding:
            return (torch.randint(TOKENS, (4, 3), generator=generator),)
        return (torch.randn(4, 3, WIDTH, generator=generator).to(self.dtype),)


def build(plan: Plan) -> nn.Module:
    """Make what is planned."""
    if isinstance(plan, str):
        return LAYERS[plan]()
    around, inner = plan
    return AROUND[around](nn.Sequential(*map(build, inner)))


def _plans(layers: list[str]) -> st.SearchStrategy[Plan]:
    def around(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        return st.tuples(st.sampled_from(list(AROUND)), st.lists(inner, min_size=1, max_size=3))

    return st.recursive(st.sampled_from(layers), around, max_leaves=5)


def nets(*dtypes: torch.dtype) -> st.SearchStrategy[Net]:
    """Return a strategy for networks."""

    def of_dtype(dtype: torch.dtype) -> st.SearchStrategy[Net]:
        # Householder's product, by which weights are made orthogonal, is not there for 16 bits.
        layers = [name for name in LAYERS if name != "orthogonal" or dtype.itemsize > 2]
        heads = st.sampled_from(["plain", "tied", "read"])
        return st.builds(Net, st.booleans(), _plans(layers), heads, st.just(dtype))

    return st.sampled_from(dtypes).flatmap(of_dtype)
