"""Norm statistics in a state dict: the tensors that a search adapts and a ticket contains.

The name alone is not enough, as a forged ticket could then replace any weight of that name. A mean needs its
variance next to it, a variance its mean; if there is none, the weight of their layer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from nni_jackpot.storage.formats.byte_planes import Form
from nni_jackpot.storage.formats.rules import Rule
from nni_jackpot.storage.formats.sealed import name_of

MEAN, VARIANCE, COUNT = "running_mean", "running_var", "num_batches_tracked"
STATISTIC = Rule(
    f"a statistic is called `{MEAN}` or `{VARIANCE}`, with the name of its module before, and is of one "
    f"dimension and float16, bfloat16, float32 or float64; or `{COUNT}`, of none and int64"
)
VALUES = Rule("statistics are finite; variances and counts are 0 or more")

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_PARTNERS = {MEAN: (VARIANCE, "weight"), VARIANCE: (MEAN, "weight")}


def check_form(name: str, form: Form) -> None:
    """Check that a norm statistic can have this name, type and shape.

    Raises
    ------
    TicketError
        If it cannot.
    """
    if not _can_be(name, form.dtype, form.shape):
        raise STATISTIC.broken(f"the statistic {name}, {form}")


def check_values(name: str, values: Tensor) -> None:
    """Check that a norm statistic can have these values.

    Raises
    ------
    TicketError
        If it cannot.
    """
    signed = _kind(name) == MEAN
    if not (bool(values.isfinite().all()) and (signed or bool((values >= 0).all()))):
        raise VALUES.broken(f"the values of {name}")


def statistics_of(state: Mapping[str, Tensor], parameters: Container[str] = ()) -> list[str]:
    """Return the names of the norm statistics in a state dict.

    Parameters
    ----------
    state
        State dict of a whole model.
    parameters
        Names of the model's parameters, if known; these are never statistics.
    """
    return [name for name in state if name not in parameters and _is_statistic(name, state)]


def _is_statistic(name: str, state: Mapping[str, Tensor]) -> bool:
    own = state[name]
    if isinstance(own, nn.Parameter) or _kind(name) not in (MEAN, VARIANCE, COUNT):
        return False
    if not _can_be(name, name_of(own.dtype), tuple(own.shape)):
        return False
    layer = name.removesuffix(_kind(name))
    if _kind(name) == COUNT:
        return any(layer + kind in state and _is_statistic(layer + kind, state) for kind in _PARTNERS)
    # Only the first existing partner counts: a mean next to a variance of another shape is not a statistic,
    # even if the weight has the right shape.
    partner = next((state[layer + kind] for kind in _PARTNERS[_kind(name)] if layer + kind in state), None)
    return partner is not None and partner.shape == own.shape and torch.is_floating_point(partner)


def _can_be(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    if _kind(name) == COUNT:
        return (dtype, shape) == ("int64", ())
    return _kind(name) in (MEAN, VARIANCE) and len(shape) == 1 and dtype in _FLOATS


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
