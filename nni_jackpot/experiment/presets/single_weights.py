"""Presets of single weights, with one budget for the whole network."""

from __future__ import annotations

from torch import nn

from nni_jackpot.experiment.presets.preset import Entries, register_preset
from nni_jackpot.modules.layouts import searched_layers

# A layer keeps at least this share of the density of the whole network.
_FLOOR = 0.1


@register_preset("weights")
def weights(model: nn.Module, sparsity: float) -> Entries:
    """Prune single weights of convolutions and linear layers, ranked together; the classifier stays dense."""
    names = [*searched_layers(model)]
    return [{"op_names": names, "sparse_ratio": sparsity, "global_group_id": 0}] if names else []


@register_preset("mobile")
def mobile(model: nn.Module, sparsity: float) -> Entries:
    """Prune single weights as ``weights`` does, and leave every layer a tenth of the network's density.

    Small depthwise layers, as in MobileNets, rank low. The default recipe has this floor anyway; others
    would leave such layers nothing.
    """
    most = 1 - _FLOOR * (1 - sparsity)
    return [{**entry, "max_sparse_ratio": most} for entry in weights(model, sparsity)]
