"""Patches of NNI's replacers for norm layers that lose channels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Replacer = Callable[[Any, Any], nn.Module]


def replace_norms_without_statistics() -> None:
    """nni/compression/speedup/replacement.py:266 and 310 slice a batch norm's statistics, even without any.

    "'NoneType' object has no attribute 'data'" with ``track_running_stats=False``. NNI also lacks replacers
    for some of these layers: "running_mean should contain 4 elements not 8" for ``SyncBatchNorm``.
    """
    for name in ("BatchNorm1d", "BatchNorm2d", "InstanceNorm1d", "InstanceNorm2d", "SyncBatchNorm"):
        _replace_where(_has_no_statistics, name, _with_fewer_features)


def replace_layer_norms_of_any_shape() -> None:
    """nni/compression/speedup/replacement.py:844 and 855 assume a layer norm with one dimension and a bias.

    PyTorch has ``bias=False`` since 2.1 ("'NoneType' object has no attribute 'data'"), and ``RMSNorm`` since
    2.4, for which NNI has no replacer. Several dimensions fail with "tuple index out of range".
    """
    for name in ("LayerNorm", "RMSNorm"):
        _replace_where(_has_several_dimensions_or_no_bias, name, _with_a_smaller_shape)


def _replace_where(is_needed: Callable[[Any], bool], name: str, ours: Replacer) -> None:
    """Register a replacer for a module type: ``ours`` if needed or if NNI has none, else NNI's replacer."""
    from nni.compression.speedup.replacement import replace_module

    theirs = replace_module.get(name, ours)
    if hasattr(theirs, "__wrapped__"):
        return

    @functools.wraps(theirs)
    def replace(module: nn.Module, masks: Any) -> nn.Module:
        return (ours if is_needed(module) else theirs)(module, masks)

    replace_module[name] = replace


def _has_no_statistics(norm: Any) -> bool:
    return norm.running_mean is None


def _has_several_dimensions_or_no_bias(norm: Any) -> bool:
    return len(norm.normalized_shape) > 1 or (getattr(norm, "bias", None) is None and norm.elementwise_affine)


def _with_fewer_features(norm: Any, masks: Any) -> nn.Module:
    from nni.compression.speedup.error_code import ShapeMisMatchError

    (mask, *_), out_mask, _ = masks
    kept = _kept(mask, 1)
    if len(kept) != len(_kept(out_mask, 1)):
        raise ShapeMisMatchError()
    small = copy.deepcopy(norm)
    small.num_features = len(kept)
    return _sliced(small, [kept])


def _with_a_smaller_shape(norm: Any, masks: Any) -> nn.Module:
    (mask, *_), _, _ = masks
    kept = [_kept(mask, dim) for dim in range(-len(norm.normalized_shape), 0)]
    small = copy.deepcopy(norm)
    small.normalized_shape = tuple(len(indices) for indices in kept)
    return _sliced(small, kept)


def _kept(mask: Tensor, dim: int) -> Tensor:
    from nni.compression.speedup.replacement import convert_to_coarse_mask

    return convert_to_coarse_mask(mask, dim)[1]


def _sliced(norm: nn.Module, kept: list[Tensor]) -> nn.Module:
    """Select indices along each dimension of all parameters and buffers; scalars are unchanged."""
    for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
        for dim, indices in enumerate(kept[: tensor.dim()]):
            tensor.data = torch.index_select(tensor.data, dim, indices.to(tensor.device))
    return norm
