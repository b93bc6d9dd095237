"""Checks of a pruner's options, and the old spelling of the options."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

from nni_jackpot.masking.budgets import BUDGETS, Rule, criterion_of_budget
from nni_jackpot.masking.criteria import CRITERIA, EVIDENCE, Criterion, needs_of
from nni_jackpot.masking.methods import METHODS, Method
from nni_jackpot.runtime.registry import close_match

# Settings that were keywords of the pruner before there were methods; two have another name today.
RENAMED = {"growth": "ramp_end", "hardening": "anneal_end"}
OLD_KEYWORDS = {
    *("lr", "momentum", "weight_decay", "temperature", "kept_score", "pruned_score", "swap_limit"),
    *RENAMED,
}
OLD_RECIPES = {"jackpot": "default"}
NORMS = ("adapt", "freeze", "tune")


def criterion_of(init: Any, init_batches: int, has_evaluator: bool) -> Criterion | None:
    """Return the criterion of the initial masks; None if the masks are given.

    Raises
    ------
    ValueError
        If there is no such criterion, or nothing to take its evidence through.
    """
    if init_batches < 1:
        raise ValueError(f"init_batches must be positive, got {init_batches}")
    if isinstance(init, Mapping):
        return None
    if not callable(init) and not (isinstance(init, str) and init in CRITERIA):
        raise ValueError(
            f"init must be one of {', '.join(CRITERIA)}, a criterion, or masks, got {init!r}"
            f"{close_match(init, CRITERIA)}"
        )
    criterion = cast(Criterion, init if callable(init) else CRITERIA[init])
    _check_evidence(f"init={init!r}", criterion, has_evaluator)
    return criterion


def budget_of(budget: str | Rule, has_evaluator: bool) -> Rule:
    """Return the rule of a budget.

    Raises
    ------
    ValueError
        If there is no such budget, or nothing to take its evidence through.
    """
    rule = budget if callable(budget) else BUDGETS.find(budget)
    if (criterion := criterion_of_budget(rule)) is not None:
        _check_evidence(f"budget={budget!r}", criterion, has_evaluator)
    return rule


def _check_evidence(option: str, criterion: Criterion, has_evaluator: bool) -> None:
    if (needs := needs_of(criterion)) != "weights" and not has_evaluator:
        raise ValueError(f"{option} takes {EVIDENCE[needs]} through an evaluator: give the pruner one")


def check_length(name: str, length: Any) -> int | None:
    """Return the length of a search as an int; None if it is None.

    Raises
    ------
    ValueError
        If the length is not a whole number, or not positive.
    """
    try:
        found = None if length is None else operator.index(length)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {length!r}") from None
    if found is not None and (found <= 0 or isinstance(length, bool)):
        raise ValueError(f"{name} must be positive, got {length!r}")
    return found


def method_of(method: str | Method, old: Mapping[str, Any]) -> Method:
    """Return the settings of a search.

    Parameters
    ----------
    method
        The settings, or the name of a method for its default settings.
    old
        Settings as keywords of the pruner, the spelling of version 0.1; None counts as not given.

    Raises
    ------
    ValueError
        If there is no such method, recipe or setting, or a setting does not go with the others.
    TypeError
        If a keyword has never been a setting.
    """
    if unknown := sorted(set(old) - {*OLD_KEYWORDS, "recipe"}):
        raise TypeError(f"LotteryJackpotPruner() got an unexpected keyword argument {unknown[0]!r}")
    given = {RENAMED.get(k, k): v for k, v in old.items() if k != "recipe" and v is not None}
    if isinstance(method, Method):
        if old:
            raise ValueError(f"{', '.join(old)}: give settings to the method, {type(method).__name__}(...)")
        return method
    kind = METHODS.find(method)
    recipe = old.get("recipe", "default")
    recipe = OLD_RECIPES.get(recipe, recipe)
    recipes = kind.recipes()
    if recipe not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes)}, got {recipe!r}")
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(f"{name} is not a setting of {method}, which has {', '.join(names)}")
    if old:
        start = "" if recipe == "default" else f".{recipe}"
        settings = ", ".join(f"{name}={value!r}" for name, value in given.items())
        warnings.warn(
            f"{', '.join(old)}: these keywords will be removed in the next release; write "
            f"method={kind.__name__}{start}({settings})",
            DeprecationWarning,
            stacklevel=3,
        )
    return replace(recipes[recipe], **given)


def norm_of(norm: str, old: dict[str, Any]) -> str:
    """Return how norm statistics are treated, and take the old keyword ``adapt_norm`` out of ``old``."""
    if (adapts := old.pop("adapt_norm", None)) is not None:
        norm = "adapt" if adapts else "freeze"
        warnings.warn(
            f"adapt_norm will be removed in the next release; write norm={norm!r}",
            DeprecationWarning,
            stacklevel=3,
        )
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    return norm
