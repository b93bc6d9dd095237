"""What the options of a pruner come to, and which of them do not go together."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nni_jackpot.masking.budgets import BUDGETS
from nni_jackpot.masking.criteria import CRITERIA, NEEDS_LOSSES
from nni_jackpot.masking.methods.method import METHODS
from nni_jackpot.masking.methods.supermask import LOGITS
from nni_jackpot.search.recipes import OF_MASKS, RECIPES, Recipe, recipe_of

# Initial scores of kept and of pruned weights under edge-popup (Sec. 4.1).
SCORES = (1.0, 0.95)
# Above this a score of float32 overflows within a few steps.
_HIGHEST_RATE = 1e12


def needs_losses(init: Any, init_batches: int, budget: str, has_evaluator: bool) -> bool:
    """Return whether the initial masks take gradients.

    Raises
    ------
    ValueError
        If there is no such start or budget, or nothing to take its gradients through.
    """
    if init not in CRITERIA if isinstance(init, str) else not isinstance(init, Mapping):
        raise ValueError(f"init must be one of {', '.join(CRITERIA)}, or masks, got {init!r}")
    needs = isinstance(init, str) and init in NEEDS_LOSSES
    if needs and not has_evaluator:
        raise ValueError(f"init={init!r} takes gradients through an evaluator: give the pruner one")
    if init_batches < 1:
        raise ValueError(f"init_batches must be positive, got {init_batches}")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    return needs


def check_length(name: str, length: Any) -> int | None:
    """Return the length of a search as an int; None for none.

    Raises
    ------
    ValueError
        If it is no whole number, or not positive.
    """
    try:
        found = None if length is None else operator.index(length)
    except TypeError:
        raise ValueError(f"compress(): {name} must be a whole number, got {length!r}") from None
    if found is not None and (found <= 0 or isinstance(length, bool)):
        raise ValueError(f"compress(): {name} must be positive, got {length!r}")
    return found


def recipe_and_scores(
    recipe: str,
    method: str,
    given: dict[str, float | None],
    swap_limit: float | None,
    scores: tuple[float, float],
) -> tuple[Recipe, tuple[float, float]]:
    """Return the settings of a search, and the initial scores of kept and of pruned weights.

    Parameters
    ----------
    recipe, method
        By name.
    given
        What takes the place of the recipe's, by name; None for what does not.
    swap_limit
        That of the search, which not every recipe goes with.
    scores
        Initial scores under edge-popup.

    Raises
    ------
    ValueError
        If a setting is none, or does not go with the others.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if swap_limit is not None and not 0 < swap_limit <= 1:
        raise ValueError(f"swap_limit must lie in (0, 1], got {swap_limit}")
    kept_score, pruned_score = scores
    if not math.isfinite(kept_score) or not math.isfinite(pruned_score) or not pruned_score < kept_score:
        raise ValueError(
            f"kept_score {kept_score} must be finite and above pruned_score {pruned_score}, finite as well"
        )
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    instead: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = replace(recipe_of(recipe, method), **instead)
    for name, high in (("lr", _HIGHEST_RATE), ("weight_decay", _HIGHEST_RATE), ("momentum", 1.0)):
        value = getattr(settings, name)
        if not 0 <= value <= high or (name == "momentum" and value == 1):
            raise ValueError(
                f"{name} must lie in [0, {high:g}{')' if name == 'momentum' else ']'}, got {value}"
            )
    for name in ("growth", "hardening"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {given[name]}")
    if not 0 <= settings.temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, got {settings.temperature}")
    if given["temperature"] and not settings.hardening:
        raise ValueError("temperature goes with hardening, the progress at which masks are soft no more")
    if swap_limit is not None and (settings.growth or settings.temperature or settings.trades):
        raise ValueError(
            "swap_limit goes with recipe='paper': it bounds how many weights take others' places, where "
            "every target keeps its number of weights"
        )
    if method != "supermask":
        return settings, scores
    is_given = any(given[name] is not None for name in OF_MASKS)
    if is_given or swap_limit is not None or scores != SCORES:
        raise ValueError(
            f"{', '.join(OF_MASKS)}, swap_limit, kept_score and pruned_score go with method='edge_popup': "
            "the scores of a supermask are logits, and its samples have the density of the budget throughout"
        )
    return settings, LOGITS
