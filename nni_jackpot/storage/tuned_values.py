"""Values of parameters that a search has tuned: affines of norm layers, and biases."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from nni_jackpot.errors import MaskError
from nni_jackpot.modules.tuned import KINDS, may_be_tuned
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.formats.byte_planes import Form, unpack
from nni_jackpot.storage.formats.rules import Rule

_FLOATS = ("float16", "bfloat16", "float32", "float64")
TUNED = Rule(
    "`tuned`, where it is there, is an object of `[type, shape]` by names, at least one, that end with "
    f"{' or '.join(f'`{kind}`' for kind in KINDS)} and are in neither `base` nor `statistics`; each is of "
    f"one dimension and {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}"
)
TUNED_VALUES = Rule("tuned parameters are finite")


def tuned_forms(tuned: Any, others: Container[str]) -> dict[str, Form]:
    """Return the forms of tuned parameters, as a ticket describes them.

    Raises
    ------
    TicketError
        If the ticket breaks a rule.
    """
    if not isinstance(tuned, dict) or not tuned:
        raise TUNED.broken("the tuned parameters")
    forms = {}
    for name, described in tuned.items():
        if not isinstance(described, list) or len(described) != 2 or not isinstance(described[1], list):
            raise TUNED.broken(f"the tuned parameter {name}")
        form = Form(described[0], tuple(described[1]))
        if name in others or not name.endswith(KINDS) or len(form.shape) != 1 or form.dtype not in _FLOATS:
            raise TUNED.broken(f"the tuned parameter {name}, {form}")
        forms[name] = form
    return forms


def taken_out(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Take tuned parameters out of a state dict, and return them.

    Raises
    ------
    MaskError
        If a name is not that of an affine or a bias.
    TicketError
        If a value is not finite.
    """
    for name in names:
        if name not in state or not may_be_tuned(name, state[name]):
            raise MaskError(f"{escaped(name)} is neither an affine of a norm layer nor a bias of the model")
    tuned = {name: state.pop(name) for name in dict.fromkeys(names)}
    _check(tuned)
    return tuned


def values_of(forms: Mapping[str, Form], packed: bytes) -> dict[str, Tensor]:
    """Return the values of tuned parameters out of their bytes.

    Raises
    ------
    TicketError
        If they cannot be decoded, or are not finite.
    """
    tuned = dict(zip(forms, unpack(packed, list(forms.values())), strict=True))
    _check(tuned)
    return tuned


def _check(tuned: Mapping[str, Tensor]) -> None:
    for name, values in tuned.items():
        if not bool(values.isfinite().all()):
            raise TUNED_VALUES.broken(f"the values of {name}")
