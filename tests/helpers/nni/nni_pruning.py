"""Prune a model with NNI and shrink it, next to the masked model; not a test."""

from __future__ import annotations

import copy
from typing import Any

import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn
from torch.utils import _pytree

CONVOLUTIONS: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Recording(ModelSpeedup):
    """A speedup that keeps its final masks: the user's masks, extended where layers must agree."""

    fixed: dict[str, dict[str, Tensor | None]]

    def initialize_propagate(self, args: Any) -> None:
        # A later step overwrites the masks, which then no longer describe the small model.
        self.fixed = copy.deepcopy(self.masks)
        super().initialize_propagate(args)


def set_activations_to_scale(model: nn.Module, x: Tensor) -> None:
    """Set the batch norms so that masked channels stay 0 and not all outputs vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        norm.running_mean.zero_()
    model.eval()


def speedup(
    model: nn.Module, size: int, config_list: list[dict[str, Any]], pruner_class: Any = L1NormPruner
) -> tuple[float, Any, Any]:
    """Prune and speed up; return the share of parameters left and the masked and the small model's outputs."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    set_activations_to_scale(model, x)
    pruner = pruner_class(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return shrink(model, x, masks)


def shrink(model: nn.Module, x: Tensor, masks: dict[str, dict[str, Tensor]]) -> tuple[float, Any, Any]:
    """Speed up; return the share of parameters left and the masked and the small model's outputs."""
    total = sum(p.numel() for p in model.parameters())
    masked = copy.deepcopy(model)
    recording = Recording(model, x, masks)
    recording.speedup_model()
    with torch.no_grad():
        for name, targets in recording.fixed.items():
            for target, mask in targets.items():
                if mask is not None:
                    masked.get_submodule(name).get_parameter(target).mul_(mask)
    model.eval()  # NNI leaves the modules that it creates in train mode.
    after = model(x)
    sum(output.sum() for output in _pytree.tree_leaves(after) if output.requires_grad).backward()
    left = sum(p.numel() for p in model.parameters()) / total
    with torch.no_grad():
        return left, masked(x), _pytree.tree_map(torch.detach, after)


def same(small: Any, masked: Any) -> None:
    """Assert that the small model's outputs are the masked model's, and not all 0."""
    flat = [tensor.flatten().double() for tensor in _pytree.tree_leaves(masked)]
    largest = max(float(tensor.abs().max()) for tensor in flat)
    assert largest > 0
    torch.testing.assert_close(small, masked, rtol=1e-3, atol=1e-4 * largest)
