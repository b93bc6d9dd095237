"""Patches of NNI's speedup: how masks propagate through a traced model."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree

from .wrapping import wraps_once


def import_without_registering_twice() -> None:
    """nni/compression/speedup/utils.py:32-33 registers fx's immutable containers as pytree nodes.

    PyTorch has registered them itself since 2.1, and prints two warnings for each repeated registration. The
    patch skips NNI's identical registration while the module is imported.
    """
    register = getattr(_pytree, "_register_pytree_node", None)
    if register is None or "nni.compression.speedup.utils" in sys.modules:
        return

    def register_once(cls: type, *args: Any, **kwargs: Any) -> None:
        if cls not in _pytree.SUPPORTED_NODES:
            register(cls, *args, **kwargs)

    _pytree._register_pytree_node = register_once
    try:
        import nni.compression.speedup.utils  # noqa: F401
    finally:
        _pytree._register_pytree_node = register


def keep_sizes_whole() -> None:
    """nni/compression/speedup/utils.py:90-103, ``tree_map_zip``, assumes that a ``torch.Size`` is a leaf.

    Newer PyTorch registers it as a pytree node and rebuilds it as a tuple: ``x.shape[1:].numel()`` fails in
    the speedup with "'tuple' object has no attribute 'numel'".
    """
    from nni.compression.speedup import utils

    if utils.tree_map is not _pytree.tree_map or torch.Size not in _pytree.SUPPORTED_NODES:
        return

    def is_size(node: Any) -> bool:
        return isinstance(node, torch.Size)

    # Several modules import tree_map_zip by value, but it looks these up in its own module.
    utils.tree_map = functools.partial(_pytree.tree_map, is_leaf=is_size)
    utils.tree_flatten = functools.partial(_pytree.tree_flatten, is_leaf=is_size)


def free_randomized_values() -> None:
    """nni/compression/speedup/mask_updater.py:261 deletes a misspelt attribute, ``_output_randomize``.

    AttributeError wherever ``len(x)``, ``x.dim()`` or ``x.size()`` is the last use of a value.
    """
    from nni.compression.speedup.container import NodeInfo

    if hasattr(NodeInfo, "_output_randomize"):
        return

    def delete(info: Any) -> None:
        del info.output_randomize

    NodeInfo._output_randomize = property(fdel=delete)


def load_masks_files() -> None:
    """nni/compression/speedup/model_speedup.py:136 loads a masks file by ``torch.load``.

    A pruner returns masks in a ``defaultdict``, which PyTorch refuses to load since 2.6: "Weights only load
    failed". The patch reads it as a plain dict, so that a masks file still cannot execute code.
    """
    from nni.compression.speedup import ModelSpeedup

    # As in `runtime.files.load_tensors`. Not imported: importing nni_jackpot applies all patches.
    allowed: list[Any] = [(lambda factory=None: {}, "collections.defaultdict"), (dict, "builtins.dict")]

    @wraps_once(ModelSpeedup, "__init__")
    def with_defaultdict(init: Any, *args: Any, **kwargs: Any) -> None:
        with torch.serialization.safe_globals(allowed):
            init(*args, **kwargs)


def pass_back_no_gradient() -> None:
    r"""nni/compression/speedup/mask_updater.py:383 and 400 multiply an output's gradient by its mask.

    Integers, such as the indices of ``F.max_pool2d(x, 2, return_indices=True)``, have a mask but no gradient,
    and so have tensors used only for their shape: "unsupported operand type(s) for \*: 'NoneType' and
    'Tensor'".
    """
    from nni.compression.speedup.mask_updater import NoChangeMaskUpdater

    def where_there_is_one(pass_back: Any, self: Any, speedup: Any, node: torch.fx.Node) -> None:
        if any(grad is not None for grad in _pytree.tree_leaves(speedup.node_infos[node].output_grad)):
            pass_back(self, speedup, node)

    for name in ("indirect_activation", "indirect_getitem"):
        wraps_once(NoChangeMaskUpdater, name)(where_there_is_one)


def find_dimension_of_concatenations() -> None:
    """nni/compression/speedup/dependency.py:335 reads the dimension from a concatenation's second argument.

    ``torch.stack(tensors)`` omits it, and ``torch.hstack`` does not have it: "tuple index out of range".
    """
    from nni.compression.speedup import dependency, mask_conflict

    build = dependency.build_channel_dependency
    if hasattr(build, "__wrapped__"):
        return
    for function in (torch.hstack, torch.column_stack, torch.dstack, torch.row_stack):
        dependency.CALL_FUNCTION_CONCAT.remove(function)
    # These two need the same channels from each input, like a sum; the others concatenate channels.
    dependency.CALL_FUNCTION_REDUCE.extend((torch.dstack, torch.row_stack))

    @functools.wraps(build)
    def build_with_dimensions(graph_module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        for node in graph_module.graph.nodes:
            if node.target in dependency.CALL_FUNCTION_CONCAT and len(node.args) < 2:
                node.kwargs = {"dim": node.kwargs.get("axis", 0), **node.kwargs}
        return build(graph_module, *args, **kwargs)

    dependency.build_channel_dependency = mask_conflict.build_channel_dependency = build_with_dimensions
