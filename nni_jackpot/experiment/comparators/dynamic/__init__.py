"""Comparators whose masks change while weights train: one file for each method."""

from nni_jackpot.experiment.comparators.dynamic.rigl import RigL
from nni_jackpot.experiment.comparators.dynamic.set import SET

__all__ = ["SET", "RigL"]
