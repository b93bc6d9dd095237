"""Layers whose weights are one matrix, linear layers and 1x1 convolutions: the ones that may be sparse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from nni_jackpot.errors import MaskError
from nni_jackpot.masks import Masks, apply_masks

Layer = nn.Linear | nn.Conv2d


def masked_matrices(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the masks (out, in) of the linear layers and 1x1 convolutions that are pruned, by name.

    Not those of another type, such as the projection in ``nn.MultiheadAttention``, which does not call it.

    Raises
    ------
    MaskError
        If a mask has not the shape of its weight.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        mask = masks.get(name, {}).get("weight")
        if mask is None or mask.all() or not _is_matrix(module):
            continue
        layer = cast(Layer, module)
        if mask.shape != layer.weight.shape:
            expected, shape = tuple(layer.weight.shape), tuple(mask.shape)
            raise MaskError(f"the mask of {name}.weight has shape {shape}, its parameter {expected}")
        found[name] = mask.flatten(1)
    return found


def nothing_to_do(kind: str = "") -> MaskError:
    """Return the error for masks that prune no layer of the kind."""
    return MaskError(f"the masks prune no linear layer and no 1x1 convolution{kind}: all would stay dense")


def with_layers(
    model: nn.Module, masks: Masks, names: Iterable[str], make: Callable[[Layer], nn.Module]
) -> nn.Module:
    """Return a masked copy of a model, in eval mode, in which the layers of these names are made anew."""
    masked = apply_masks(copy.deepcopy(model), masks).eval()
    for name in names:
        masked.set_submodule(name, make(cast(Layer, masked.get_submodule(name))).eval())
    return masked


def strides(layer: Layer) -> tuple[int, int] | None:
    """Return how far a 1x1 convolution moves along height and width; None for a linear layer."""
    return cast(tuple[int, int], layer.stride) if isinstance(layer, nn.Conv2d) else None


def _is_matrix(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        unpadded = module.padding in ((0, 0), "same", "valid")
        return module.kernel_size == (1, 1) and module.groups == 1 and unpadded
    return type(module) is nn.Linear
