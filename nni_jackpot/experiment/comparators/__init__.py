"""Methods that train weights under masks, to compare jackpots with."""

from nni_jackpot.experiment.comparators.comparator import COMPARATORS, Comparator, register_comparator
from nni_jackpot.experiment.comparators.one_shot import OneShot, SparseGPT
from nni_jackpot.experiment.comparators.tuned import InitialTuned, JackpotTuned

__all__ = [
    "COMPARATORS",
    "Comparator",
    "InitialTuned",
    "JackpotTuned",
    "OneShot",
    "SparseGPT",
    "register_comparator",
]
