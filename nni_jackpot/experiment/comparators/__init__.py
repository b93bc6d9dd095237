"""Methods that train weights under masks, to compare jackpots with: one file for each method."""

from nni_jackpot.experiment.comparators.comparator import COMPARATORS, Comparator, Step, register_comparator
from nni_jackpot.experiment.comparators.rigl import RigL
from nni_jackpot.experiment.comparators.tuned import InitialTuned, JackpotTuned

__all__ = ["COMPARATORS", "Comparator", "InitialTuned", "JackpotTuned", "RigL", "Step", "register_comparator"]
