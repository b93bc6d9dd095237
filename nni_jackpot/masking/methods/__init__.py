"""Search methods: how masks follow scores, and what training sees of them. One file per method."""

from nni_jackpot.masking.methods.edge_popup import EdgePopup
from nni_jackpot.masking.methods.method import METHODS, MaskSchedule, Method, register_method
from nni_jackpot.masking.methods.patterns import Patterns
from nni_jackpot.masking.methods.supermask import Supermask

__all__ = ["METHODS", "EdgePopup", "MaskSchedule", "Method", "Patterns", "Supermask", "register_method"]
