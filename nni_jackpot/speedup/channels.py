"""Channels that are masked as a whole are taken out: a smaller dense model, for any hardware and engine."""

from __future__ import annotations

from typing import Any, cast

from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.masks import Masks, apply_masks, fit_masks
from nni_jackpot.speedup.calls import Call, Inputs
from nni_jackpot.speedup.outputs import check_same, copy_of, outputs_of, reason


def shrink(model: nn.Module, masks: Masks, example_input: Inputs) -> nn.Module:
    """Return a smaller dense model that computes what the masked model computes.

    NNI's ``ModelSpeedup`` finds the channels and the layers after them that shrink along. It works on a copy,
    on the CPU; the model itself stays as it is.

    Parameters
    ----------
    model
        The unwrapped model; call ``pruner.unwrap_model()`` first.
    masks
        NNI's masks, searched with ``granularity="out_channel"`` or ``"in_channel"``. Those of biases and norm
        layers count as well: a channel whose bias is left is not gone. Weights masked within a channel that
        stays become zeros.
    example_input
        What the model takes, (N, ...): a tensor, a tuple or list of arguments, a dict of keyword arguments,
        and these nested. Outputs are compared on it.

    Returns
    -------
    nn.Module
        In eval mode, on the model's device.

    Raises
    ------
    MaskError
        If the masks do not fit the model, the model is still wrapped, or no whole channel is masked.
    SpeedupError
        If the example does not fit the model, ModelSpeedup cannot follow the model, or the smaller model
        computes something else.
    """
    fitting = fit_masks(model, masks)
    device = next((parameter.device for parameter in model.parameters()), None)
    masked = apply_masks(copy_of(model), masks).cpu().eval()
    call = Call.to(masked, example_input)
    expected = outputs_of(copy_of(masked), call)
    own: dict[str, dict[str, Tensor]] = {}
    for name, mask in fitting.items():
        module, _, target = f"model.{name}".rpartition(".")
        own.setdefault(module, {})[target] = mask.cpu().clone()
    size = _parameters(masked)
    try:
        flat, inputs = _flat(masked, call.on("cpu"))
        ModelSpeedup(flat, inputs, own).speedup_model()
    except Exception as error:  # NNI raises whatever it meets while it traces the model
        raise SpeedupError(f"NNI's ModelSpeedup fails on this model: {reason(error)}") from error
    small = cast(nn.Module, flat.model).eval()  # the modules that NNI makes anew are in train mode
    found = outputs_of(copy_of(small), call, "NNI's ModelSpeedup fails on this model: the smaller model")
    if _parameters(small) == size:
        raise MaskError(
            "the masks take out no channel that ModelSpeedup can remove: search with "
            "granularity='out_channel', and with NNI's auto_set_denpendency_group_ids where layers are added "
            "to each other"
        )
    advice = (
        ". A channel is gone only where its bias and its norm layer's weight and bias are masked too: let "
        "them follow the weight with align, as examples/channels.py does"
    )
    check_same(expected, found, "the smaller model", advice)
    return small.to(device)


def _flat(model: nn.Module, call: Call) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """Return a model as the ``model`` of one that takes tensors one by one, which is all that NNI traces."""
    graph, inputs = Graph(), call.tensors()

    def placeholder(_: Tensor) -> Node:
        return graph.placeholder(f"input_{len(graph.nodes)}")

    nested: Any = tree_map_only(Tensor, placeholder, call)
    graph.output(graph.call_module("model", nested.args, nested.kwargs))
    return GraphModule({"model": model}, graph).eval(), tuple(inputs)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
