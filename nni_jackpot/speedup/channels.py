"""Removal of masked channels: a smaller dense model, for any hardware and inference engine."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from nni_jackpot.errors import MaskError, SpeedupError, first_line
from nni_jackpot.masks import Masks, apply_masks, fit_masks
from nni_jackpot.speedup.calls import Call, Inputs
from nni_jackpot.speedup.outputs import check_same, copy_of, outputs_of


def shrink(model: nn.Module, masks: Masks, example_input: Inputs) -> nn.Module:
    """Return a smaller dense model with the same outputs as the masked model.

    NNI's ``ModelSpeedup`` finds the masked channels and the later layers that shrink with them. It works on a
    copy on the CPU.

    Parameters
    ----------
    model
        The unwrapped model; call ``pruner.unwrap_model()`` first. It is not changed.
    masks
        NNI's masks, searched with ``granularity="out_channel"`` or ``"in_channel"``. A channel is removed
        only if its bias and its norm layer's parameters are masked too. Weights masked within a kept channel
        become zeros.
    example_input
        Inputs of the model, (N, ...): a tensor, a tuple or list of arguments, or a dict of keyword arguments,
        which may be nested. The outputs of both models are compared on it.

    Returns
    -------
    nn.Module
        The smaller model, in eval mode, on the model's device.

    Raises
    ------
    MaskError
        If the masks do not fit the model or mask no whole channel, or the model is still wrapped.
    SpeedupError
        If the example does not fit the model, ModelSpeedup fails on the model, or the smaller model computes
        something else.
    """
    from nni.compression.speedup import ModelSpeedup  # the import takes seconds

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
    except Exception as error:  # tracing the model may raise any error
        raise SpeedupError(f"NNI's ModelSpeedup fails on this model: {first_line(error)}") from error
    small = cast(nn.Module, flat.model).eval()  # NNI leaves the modules that it replaces in train mode
    found = outputs_of(copy_of(small), call, "NNI's ModelSpeedup fails on this model: the smaller model")
    if _parameters(small) == size:
        raise MaskError(
            "the masks contain no channel that ModelSpeedup can remove: search with "
            "granularity='out_channel', and with NNI's auto_set_denpendency_group_ids where layers are added "
            "to each other"
        )
    advice = (
        ". A channel is removed only if its bias and its norm layer's weight and bias are masked too: align "
        "them with the weight, as examples/channels.py does"
    )
    check_same(expected, found, "the smaller model", advice)
    return small.to(device)


def _flat(model: nn.Module, call: Call) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """Wrap a model so that it takes a flat list of tensors, the only signature that NNI traces."""
    graph, inputs = Graph(), call.tensors()

    def placeholder(_: Tensor) -> Node:
        return graph.placeholder(f"input_{len(graph.nodes)}")

    nested: Any = tree_map_only(Tensor, placeholder, call)
    graph.output(graph.call_module("model", nested.args, nested.kwargs))
    return GraphModule({"model": model}, graph).eval(), tuple(inputs)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
