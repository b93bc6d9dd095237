"""Methods that train weights under masks, to compare jackpots with: one file for each method."""

from nni_jackpot.experiment.comparators.comparator import COMPARATORS, Comparator, Step, register_comparator
from nni_jackpot.experiment.comparators.dynamic import DSR, SET, DeepR, Gradual, RigL, SparseMomentum
from nni_jackpot.experiment.comparators.one_shot import OneShot, SparseGPT
from nni_jackpot.experiment.comparators.tuned import InitialTuned, JackpotTuned

__all__ = [
    "COMPARATORS",
    "DSR",
    "SET",
    "Comparator",
    "DeepR",
    "Gradual",
    "InitialTuned",
    "JackpotTuned",
    "OneShot",
    "RigL",
    "SparseGPT",
    "SparseMomentum",
    "Step",
    "register_comparator",
]
