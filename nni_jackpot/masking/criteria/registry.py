"""The registry of pruning criteria, and the evidence that a criterion is called with."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeAlias, TypeVar

from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.runtime.registry import Registry

Importance: TypeAlias = dict[Hashable, Tensor]
Losses: TypeAlias = Callable[[Callable[[Tensor], None]], None]
"""Runs training steps and hands every loss, with its graph, to the visitor (`calibration.losses_of`)."""
Criterion: TypeAlias = Callable[..., Importance]
"""Called with the weights, and with the evidence that the criterion needs besides them."""

CRITERIA: Registry[Criterion] = Registry("criterion")

# What a criterion may look at besides the weights, and what is taken from training batches for it.
EVIDENCE = {
    "weights": "nothing",
    "losses": "gradients",
    "activations": "activations",
    "hessians": "activations",
}

C = TypeVar("C", bound=Criterion)


def register_criterion(name: str, needs: str = "weights") -> Callable[[C], C]:
    """Return a decorator that registers a criterion under a name.

    Parameters
    ----------
    name
        The name.
    needs
        The evidence that the criterion is called with: ``"weights"`` alone; ``"losses"``, a function that
        runs training steps and hands every loss to a visitor; ``"activations"``, pairs of a weight's key and
        the `InputStatistics` of its layer; or ``"hessians"``, the same with Gram matrices of the inputs, the
        Hessians of the layers' squared errors.

    Raises
    ------
    ValueError
        If the name is taken, or there is no such evidence.
    """
    if needs not in EVIDENCE:
        raise ValueError(f"needs must be one of {', '.join(EVIDENCE)}, got {needs!r}")
    return CRITERIA.register(name, needs=needs)


def declared_needs(algorithm: object) -> str | None:
    """Return what a criterion or a budget has declared to need, also one with `functools.partial` around it.

    A callable that is not registered may have an attribute ``needs``.
    """
    while isinstance(algorithm, partial) and not hasattr(algorithm, "needs"):
        algorithm = algorithm.func
    return getattr(algorithm, "needs", None)


def needs_of(criterion: Criterion) -> str:
    """Return the evidence that a criterion is called with, one of `EVIDENCE`.

    Raises
    ------
    ValueError
        If the criterion declares evidence that does not exist.
    """
    needs = declared_needs(criterion) or "weights"
    if needs not in EVIDENCE:
        raise ValueError(f"a criterion's needs must be one of {', '.join(EVIDENCE)}, got {needs!r}")
    return needs


def finite(criterion: str, importance: Importance) -> Importance:
    """Return the importance of weights, checked.

    Raises
    ------
    SearchDivergedError
        If an importance is NaN or infinite.
    """
    for key, values in importance.items():
        if not values.isfinite().all():
            raise SearchDivergedError(
                f"the {criterion} importance of {key} is not finite: an input, the loss, or a gradient of "
                "it, became NaN or infinite on the batches it was computed from"
            )
    return importance
