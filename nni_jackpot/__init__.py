"""Lottery jackpots for NNI: sparse sub-networks of a pre-trained network, found without changing a weight.

Importing the package repairs what NNI 3.0 needs to run on today's PyTorch (`nni_bridge.compat`). Import it
before or beside ``nni.compression``; nothing changes where NNI works already.
"""

import nni_jackpot.nni_bridge.compat

nni_jackpot.nni_bridge.compat.apply()

from nni_jackpot.errors import JackpotError  # noqa: E402
from nni_jackpot.masking.budgets import register_budget  # noqa: E402
from nni_jackpot.masking.criteria import register_criterion  # noqa: E402
from nni_jackpot.masking.methods import EdgePopup, Method, Patterns, Supermask, register_method  # noqa: E402
from nni_jackpot.masks import MaskOverlap, apply_masks, load_masks, mask_overlap, save_masks  # noqa: E402
from nni_jackpot.one_call import find_jackpot  # noqa: E402
from nni_jackpot.pruner import LotteryJackpotPruner  # noqa: E402
from nni_jackpot.search.match_dense import MatchDense  # noqa: E402
from nni_jackpot.storage.base_folder import BaseFolder  # noqa: E402
from nni_jackpot.storage.sparse_checkpoint import load_sparse, save_sparse  # noqa: E402
from nni_jackpot.storage.ticket import Ticket, load_ticket, save_ticket  # noqa: E402
from nni_jackpot.storage.ticket_box import TicketBox  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BaseFolder",
    "EdgePopup",
    "JackpotError",
    "LotteryJackpotPruner",
    "MaskOverlap",
    "MatchDense",
    "Method",
    "Patterns",
    "Supermask",
    "Ticket",
    "TicketBox",
    "__version__",
    "apply_masks",
    "find_jackpot",
    "load_masks",
    "load_sparse",
    "load_ticket",
    "mask_overlap",
    "register_budget",
    "register_criterion",
    "register_method",
    "save_masks",
    "save_sparse",
    "save_ticket",
]
