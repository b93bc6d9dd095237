"""The masks that the search of a block starts from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from nni_jackpot.masking.activations.input_statistics import InputStatistics
from nni_jackpot.masking.activations.layers import is_matrix_layer
from nni_jackpot.masking.activations.swaps import benefit_of_keeping, swap_in_groups, swap_in_rows
from nni_jackpot.masking.criteria import magnitude, wanda
from nni_jackpot.search.blockwise.targets import Target, row_groups

STARTS = ("swaps", "wanda", "magnitude")
# Longest groups whose pairs of weights are all compared.
_LONGEST = 32


def layers_of(block: nn.Module, targets: Mapping[str, Target]) -> dict[str, nn.Module]:
    """Return the layers whose weight is a target, by the name of the parameter."""
    layers = {}
    for name in targets:
        prefix, _, parameter = name.rpartition(".")
        layer = block.get_submodule(prefix)
        if parameter == "weight" and is_matrix_layer(layer):
            layers[name] = layer
    return layers


@torch.no_grad()
def start_masks(
    block: nn.Module,
    targets: Mapping[str, Target],
    start: str,
    statistics: Mapping[str, InputStatistics],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the masks that a search starts from, and the initial scores, both of the scores' shapes.

    Parameters
    ----------
    block
        The block.
    targets
        By the names of parameters within the block.
    start
        ``"magnitude"``; ``"wanda"``; or ``"swaps"``: Wanda's mask, improved by exact swaps. A parameter
        without statistics starts from magnitude.
    statistics
        Of the inputs, by the names of parameters; with Gram matrices for ``"swaps"``.

    Returns
    -------
    kept : dict
        The masks, boolean.
    scores : dict
        By how much a weight lowers the squared error of its layer: exactly after swaps; if inputs were
        uncorrelated for Wanda, or of equal size as well for magnitude.
    """
    weights: dict[Hashable, Tensor] = {name: block.get_parameter(name).detach() for name in targets}
    importance = magnitude(weights)
    if start != "magnitude":
        importance |= wanda(weights, statistics.items())
    kept, scores = {}, {}
    for name, target in targets.items():
        scores[name] = target.grains.reduce(importance[name].square(), lambda values: values.sum(-1))
        kept[name] = target.select(scores[name])
        if start == "swaps" and name in statistics:
            found = _swapped(weights[name], target, kept[name], statistics[name])
            if found is not None:
                kept[name], scores[name] = found
    return kept, scores


def _swapped(
    weight: Tensor, target: Target, kept: Tensor, seen: InputStatistics
) -> tuple[Tensor, Tensor] | None:
    """Return a mask improved by swaps, and scores; None if the grains of the target allow no swaps."""
    assert seen.gram is not None
    if target.grains.scaler is not None:
        return None
    indices = seen.rows(torch.arange(weight.numel(), device=weight.device).view(weight.shape))
    masks, scores = [], []
    for rows, mask, gram, places in zip(seen.rows(weight), seen.rows(kept), seen.gram, indices, strict=True):
        groups = row_groups(target, places)
        if groups is None or (len(groups) > 1 and groups.shape[1] > _LONGEST):
            return None
        is_whole = len(groups) == 1
        better = swap_in_rows(rows, mask, gram) if is_whole else swap_in_groups(rows, mask, gram, groups)
        masks.append(better)
        scores.append(benefit_of_keeping(rows, better, gram))
    return seen.from_rows(torch.stack(masks)), seen.from_rows(torch.stack(scores))
