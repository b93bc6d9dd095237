"""Weights tuned under fixed masks (Eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass

from nni_jackpot.experiment.comparators.comparator import Comparator, register_comparator
from nni_jackpot.runtime.settings import one_of, option


@register_comparator("initial_tuned")
@dataclass(frozen=True, kw_only=True)
class InitialTuned(Comparator):
    """Tune weights under the masks that the search starts from."""


@register_comparator("jackpot_tuned")
@dataclass(frozen=True, kw_only=True)
class JackpotTuned(Comparator):
    """Tune weights under the masks of the jackpot, after the search."""

    start: str = option("masks at the start", one_of(("jackpot",)), "jackpot")
