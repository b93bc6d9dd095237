"""Comparators whose masks change while weights train: one file for each method."""

from nni_jackpot.training.methods.deep_r import DeepR
from nni_jackpot.training.methods.dsr import DSR
from nni_jackpot.training.methods.gradual import Gradual
from nni_jackpot.training.methods.grasp import GraSP
from nni_jackpot.training.methods.lt import LT
from nni_jackpot.training.methods.obd import OBD
from nni_jackpot.training.methods.rigl import RigL
from nni_jackpot.training.methods.set import SET
from nni_jackpot.training.methods.snip import SNIP
from nni_jackpot.training.methods.sparse_momentum import SparseMomentum
from nni_jackpot.training.methods.static import Static

__all__ = ["DSR", "LT", "OBD", "SET", "SNIP", "DeepR", "GraSP", "Gradual", "RigL", "SparseMomentum", "Static"]
