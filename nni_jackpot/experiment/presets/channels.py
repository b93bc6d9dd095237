"""The preset of channels that ``shrink`` and NNI's ModelSpeedup can take out of the network."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, symbolic_trace

from nni_jackpot.errors import ConfigListError, first_line
from nni_jackpot.experiment.presets.preset import Entries, register_preset

# Modules and functions that give each channel of the output from the same channel of the input.
_NORMS = (nn.BatchNorm2d,)
_ALONG = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_FUNCTIONS = {"relu", "relu_", "max_pool2d", "avg_pool2d", "gelu", "silu", "hardswish", "dropout"}


@register_preset("channels", recipe="paper", norm="freeze")
def channels(model: nn.Module, sparsity: float) -> Entries:
    """Prune output channels of convolutions whose channels no sum, concatenation or reshape uses.

    The norm layer after a convolution follows its channels (``align``).
    """
    graph = _traced(model)
    found: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        conv = _module(graph, node)
        if type(conv) is nn.Conv2d and conv.groups == 1:
            norms = _norms_before_convolutions(graph, node)
            if norms is not None:
                found[str(node.target)] = norms
    if not found:
        return []
    entries: Entries = [
        {"op_names": list(found), "sparse_ratio": sparsity, "granularity": "out_channel"},
    ]
    for name, norms in found.items():
        source = {"module_name": name, "target_name": "weight", "dims": [0]}
        for norm in norms:
            settings: dict[str, Any] = {target: {"align": source} for target in ("weight", "bias")}
            entries.append({"op_names": [norm], "target_settings": settings})
    return entries


def _traced(model: nn.Module) -> GraphModule:
    try:
        return symbolic_trace(model)
    except Exception as error:  # of the network's own code
        raise ConfigListError(
            f"preset: channels cannot follow the channels through this network ({first_line(error)}): write "
            "a config_list with granularity: out_channel"
        ) from error


def _module(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _norms_before_convolutions(graph: GraphModule, start: Node) -> list[str] | None:
    """Return the norm layers between a convolution and the next ones; None if there is anything else."""
    norms: list[str] = []
    nodes, seen = list(start.users), {start}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        module = _module(graph, node)
        if type(module) is nn.Conv2d and module.groups == 1:
            continue  # the next layer, which loses inputs
        is_norm = type(module) in _NORMS
        is_function = node.op in ("call_function", "call_method") and _name(node) in _FUNCTIONS
        if not (is_norm or type(module) in _ALONG or is_function):
            return None
        if is_norm and getattr(module, "affine", False):
            norms.append(str(node.target))
        if not node.users:
            return None
        nodes += node.users
    return norms if len(seen) > 1 or start.users else None


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
