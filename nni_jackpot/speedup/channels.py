"""Channels that are masked as a whole are taken out: a smaller dense model, for any hardware and engine."""

from __future__ import annotations

import copy

from nni.compression.speedup import ModelSpeedup
from torch import nn

from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.masks import Masks, apply_masks
from nni_jackpot.speedup.outputs import Inputs, check_same, on_cpu, outputs_of


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
        What the model takes, (N, ...), or a tuple of such; outputs are compared on it.

    Returns
    -------
    nn.Module
        In eval mode, on the model's device.

    Raises
    ------
    MaskError
        If the masks do not fit the model, the model is still wrapped, or no whole channel is masked.
    SpeedupError
        If ModelSpeedup cannot follow the model, or the smaller model computes something else.
    """
    device = next(model.parameters()).device
    masked = apply_masks(copy.deepcopy(model), masks).cpu().eval()
    inputs = on_cpu(example_input)
    expected = outputs_of(masked, inputs)
    own = {
        name: {target: None if mask is None else mask.cpu().clone() for target, mask in targets.items()}
        for name, targets in masks.items()
    }
    size = _parameters(masked)
    try:
        ModelSpeedup(masked, inputs, own).speedup_model()
        found = outputs_of(masked.eval(), inputs)  # the modules that NNI makes anew are in train mode
    except Exception as error:  # NNI raises whatever it meets while it traces the model
        raise SpeedupError(f"NNI's ModelSpeedup fails on this model: {error}") from error
    if _parameters(masked) == size:
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
    return masked.to(device)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
