"""How a mask follows its scores: one file for each method."""

from nni_jackpot.masking.methods import edge_popup, supermask

__all__ = ["edge_popup", "supermask"]
