"""An architecture: a small network with random weights, and the law for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from law import Inputs, Searched, check_law
from nni.compression.base.setting import PruningSetting
from torch import nn

OF_WEIGHTS = {"weight": PruningSetting.default_setting["weight"]}
IMAGE_LAYERS = ("Conv2d", "Linear")


@dataclass(frozen=True)
class Architecture:
    """A network, inputs for it, and how a user would have it searched."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    op_types: tuple[str, ...] = IMAGE_LAYERS
    registered: tuple[str, ...] = ()
    """Types that the user makes known to NNI first."""
    heavy: bool = False

    def check(self) -> Searched:
        """Check the law; return what was searched."""
        entries = [{"op_types": list(self.op_types), "sparse_ratio": 0.5}]
        with _registered(self.registered):
            return check_law(self._make, entries, self.inputs())

    def _make(self) -> nn.Module:
        """Make the network, with random numbers where it begins with zeros or ones, which hide a branch."""
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.min() == parameter.max():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


@contextmanager
def _registered(kinds: tuple[str, ...]) -> Iterator[None]:
    for kind in kinds:
        PruningSetting.register(kind, OF_WEIGHTS)
    try:
        yield
    finally:
        for kind in kinds:
            del PruningSetting.registry[kind]


def images(*shape: int) -> Inputs:
    """Return two images, or volumes, of a shape."""
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)),)


def of_class(make: Callable[..., nn.Module], *arguments: Any, size: int = 32, **options: Any) -> Architecture:
    """Return a class of torchvision's with smaller numbers than it is published with."""
    return Architecture(partial(make, *arguments, num_classes=5, **options), partial(images, 3, size, size))
