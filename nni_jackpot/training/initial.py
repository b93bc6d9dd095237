"""The masks that a training from random weights starts from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from nni_jackpot.errors import CalibrationError
from nni_jackpot.masking.budgets import BUDGETS, Unit, criterion_of_budget
from nni_jackpot.masking.criteria import CRITERIA, Criterion, Importance, Losses, needs_of
from nni_jackpot.masking.topk import keep_top
from nni_jackpot.runtime.settings import Rule


def _is_possible(criterion: Criterion | None) -> bool:
    """Return whether a training has the evidence of a criterion: it has no activations."""
    return criterion is None or needs_of(criterion) in ("weights", "losses")


def _criteria() -> list[str]:
    return [name for name, criterion in CRITERIA.items() if _is_possible(criterion)]


def _budgets() -> list[str]:
    return [name for name, rule in BUDGETS.items() if _is_possible(criterion_of_budget(rule))]


CRITERION = Rule(lambda: f"out of {', '.join(_criteria())}", lambda value: value in _criteria(), is_open=True)
BUDGET = Rule(lambda: f"out of {', '.join(_budgets())}", lambda value: value in _budgets(), is_open=True)


def initial_masks(
    weights: Mapping[str, Tensor],
    keep: int,
    criterion: str = "random",
    budget: str = "erdos_renyi_kernel",
    losses: Losses | None = None,
) -> dict[str, Tensor]:
    """Return boolean masks by a criterion, which keep an exact number of weights.

    Parameters
    ----------
    weights
        The weights to prune, by name; leaf tensors.
    keep
        Number of weights that all masks together keep.
    criterion
        Ranks the weights of a layer, by name (`nni_jackpot.masking.criteria`).
    budget
        Shares out the weights among layers, by name (`nni_jackpot.masking.budgets`); ``as_configured`` gives
        all layers the same density.
    losses
        Losses of a few batches, for a criterion that needs them.

    Raises
    ------
    CalibrationError
        If a criterion needs losses and there are none, or needs activations.
    """
    importance = importance_of(CRITERIA.find(criterion), weights, losses)
    kept = kept_counts(importance, keep, budget, weights, losses)
    return {name: keep_top(importance[name], kept[name]) for name in weights}


def kept_counts(
    importance: Mapping[Hashable, Tensor],
    keep: int,
    budget: str,
    weights: Mapping[str, Tensor],
    losses: Losses | None = None,
) -> dict[str, int]:
    """Return how many weights each layer keeps, ``keep`` in all; parameters as for `initial_masks`."""
    rule = BUDGETS.find(budget)
    if (needed := criterion_of_budget(rule)) is not None:
        importance = importance_of(needed, weights, losses)
    total = sum(weight.numel() for weight in weights.values())
    # Half a weight more, so that ``int`` finds the number of zeros again.
    ratio = min(1.0, (total - keep + 0.5) / max(1, total))
    units = {
        name: Unit(weight.numel(), 1, ratio, shape=tuple(weight.shape)) for name, weight in weights.items()
    }
    kept = rule(units, {name: importance[name] for name in weights})
    # Layers are rounded each; the largest ones make up for it.
    while missing := keep - sum(kept.values()):
        step = 1 if missing > 0 else -1
        fitting = [name for name in kept if 0 <= kept[name] + step <= weights[name].numel()]
        for name in sorted(fitting, key=lambda name: -weights[name].numel())[: abs(missing)]:
            kept[name] += step
    return kept


def importance_of(criterion: Criterion, weights: Mapping[str, Tensor], losses: Losses | None) -> Importance:
    """Return the importance of weights by a criterion; raises CalibrationError without its evidence."""
    needs = needs_of(criterion)
    if needs == "weights":
        return criterion(weights)
    if needs != "losses" or losses is None:
        raise CalibrationError(f"masks at the start by this criterion need {needs}, and there are none")
    with torch.enable_grad():
        return criterion(weights, losses)
