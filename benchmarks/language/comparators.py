"""SparseGPT, block after block: a comparator, which changes weights unless only its masks are used."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot.masking.activations.criteria import sparsegpt_update
from nni_jackpot.masking.activations.input_statistics import InputWatcher
from nni_jackpot.masking.activations.layers import from_rows, to_rows
from nni_jackpot.masking.granularity import parse_pattern
from nni_jackpot.search.blockwise import blocks_of, targets_of
from nni_jackpot.search.blockwise.blocks import capture


@torch.no_grad()
def sparsegpt_blocks(
    model: nn.Module, batches: Iterable[Any], pattern: str | None, ratio: float | None, update: bool = True
) -> nn.Module:
    """Return a copy of a network pruned by SparseGPT, each block on the outputs of pruned blocks.

    Without ``update`` the weights that SparseGPT keeps have the values of the dense network.
    """
    model = copy.deepcopy(model)
    names = blocks_of(model)
    captured = capture(model, names, batches)
    hidden = captured.hidden
    for name, calls in zip(names, captured.calls, strict=True):
        block = model.get_submodule(name)
        targets = targets_of(model, [name], pattern, ratio)
        layers = {n: model.get_submodule(n.removesuffix(".weight")) for n in targets}
        with InputWatcher(layers, gram=True) as watcher:
            for call, x, tokens in zip(calls, hidden, captured.tokens, strict=True):
                watcher.tokens = tokens
                call.run(block, x)
        for n, layer in layers.items():
            weight: Tensor = layer.weight
            gram = watcher.statistics[n].gram
            assert gram is not None
            mask, updated = sparsegpt_update(
                to_rows(layer, weight)[0],
                gram[0],
                density=1 - (ratio or 0),
                pattern=parse_pattern(pattern) if pattern else None,
            )
            if update:
                weight.copy_(from_rows(layer, updated[None]))
            else:
                weight.mul_(from_rows(layer, mask[None]))
        hidden = [call.run(block, x) for call, x in zip(calls, hidden, strict=True)]
    return model
