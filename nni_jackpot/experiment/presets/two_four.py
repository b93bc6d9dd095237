"""The preset of 2:4 patterns, which sparse tensor cores and CPU kernels compute faster."""

from __future__ import annotations

from torch import nn

from nni_jackpot.experiment.presets.preset import Entries, register_preset
from nni_jackpot.modules.layouts import searched_layers


@register_preset("2:4", sparsity=0.5)
def two_four(model: nn.Module, sparsity: float) -> Entries:
    """Prune 2 of every 4 weights of layers whose inputs come in fours; the classifier stays dense."""
    names = [
        name
        for name, layer in searched_layers(model).items()
        if layer.weight.shape[1] % 4 == 0  # type: ignore[index]
    ]
    return [{"op_names": names, "sparse_pattern": "2:4"}] if names else []
