"""Presets: ``preset: channels`` in the place of a config list."""

from nni_jackpot.experiment.presets import channels, single_weights, two_four
from nni_jackpot.experiment.presets.preset import (
    PRESETS,
    check_preset,
    entries_of,
    register_preset,
    with_preset,
)

__all__ = [
    "PRESETS",
    "channels",
    "check_preset",
    "entries_of",
    "register_preset",
    "single_weights",
    "two_four",
    "with_preset",
]
