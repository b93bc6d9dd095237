"""Comparators whose masks change while weights train: one file for each method."""

from nni_jackpot.training.methods.deep_r import DeepR
from nni_jackpot.training.methods.dsr import DSR
from nni_jackpot.training.methods.gradual import Gradual
from nni_jackpot.training.methods.rigl import RigL
from nni_jackpot.training.methods.set import SET
from nni_jackpot.training.methods.sparse_momentum import SparseMomentum

__all__ = ["DSR", "SET", "DeepR", "Gradual", "RigL", "SparseMomentum"]
