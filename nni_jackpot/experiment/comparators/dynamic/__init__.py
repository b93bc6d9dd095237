"""Comparators whose masks change while weights train: one file for each method."""

from nni_jackpot.experiment.comparators.dynamic.deep_r import DeepR
from nni_jackpot.experiment.comparators.dynamic.dsr import DSR
from nni_jackpot.experiment.comparators.dynamic.gradual import Gradual
from nni_jackpot.experiment.comparators.dynamic.rigl import RigL
from nni_jackpot.experiment.comparators.dynamic.set import SET
from nni_jackpot.experiment.comparators.dynamic.sparse_momentum import SparseMomentum

__all__ = ["DSR", "SET", "DeepR", "Gradual", "RigL", "SparseMomentum"]
