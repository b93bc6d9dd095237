"""Conversion of values to plain data that the safe unpickler can read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import CheckpointError

_EXACT = (type(None), bool, int, float, str, bytes)


def as_plain(value: Any, name: str) -> Any:
    """Convert a value to tensors, numbers, strings, lists, tuples and dicts.

    Equal values give equal results. A path, an enumeration or a date becomes its text, a dataclass a dict of
    its fields and its class name, a NumPy number a Python number.

    Parameters
    ----------
    value
        The value.
    name
        Name of the value, for messages.

    Raises
    ------
    CheckpointError
        If the value, or a value inside it, has an unsupported type.
    """
    if type(value) in _EXACT:
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return as_plain(value.item(), name)
    if isinstance(value, np.ndarray):
        return as_plain(value.tolist(), name)
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, int | float | str | bytes):  # a subclass
        kind: Any = next(kind for kind in (int, float, str, bytes) if isinstance(value, kind))
        return kind(value)
    if isinstance(value, Mapping):
        return {as_plain(k, f"a key of {name}"): as_plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [as_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, set | frozenset):
        return sorted((as_plain(item, f"an item of {name}") for item in value), key=repr)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, date | time | Decimal | Fraction | complex | torch.dtype | torch.device | range):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: as_plain(getattr(value, f.name), f"{name}.{f.name}") for f in fields(value)}
        return {"class": type(value).__name__, **found}
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: give it as numbers, strings, "
        "lists or dicts"
    )
