"""Lottery jackpots for NNI: sparse sub-networks of a pre-trained network, found without changing a weight.

Importing the package repairs what NNI 3.0 needs to run on today's PyTorch (`nni_bridge.compat`), before or
after the import of ``nni.compression``; nothing changes where NNI works already. The names below are imported
on first use, because NNI imports Lightning and Transformers where these are installed, which takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

from nni_jackpot.errors import JackpotError
from nni_jackpot.nni_bridge import repair_nni

if TYPE_CHECKING:
    from nni_jackpot.masking.budgets import register_budget
    from nni_jackpot.masking.criteria import register_criterion
    from nni_jackpot.masking.methods import EdgePopup, Method, Patterns, Supermask, register_method
    from nni_jackpot.masks import MaskOverlap, apply_masks, load_masks, mask_overlap, save_masks
    from nni_jackpot.one_call import find_jackpot
    from nni_jackpot.pruner import LotteryJackpotPruner
    from nni_jackpot.search.match_dense import MatchDense
    from nni_jackpot.sparse_training_pruner import SparseTrainingPruner
    from nni_jackpot.storage.base_folder import BaseFolder
    from nni_jackpot.storage.sparse_checkpoint import load_sparse, save_sparse
    from nni_jackpot.storage.ticket import Ticket, load_ticket, save_ticket
    from nni_jackpot.storage.ticket_box import TicketBox

repair_nni()

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
    "SparseTrainingPruner",
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

# The modules of the names above that are imported on first use.
_LAZY = {
    "masking.budgets": ("register_budget",),
    "masking.criteria": ("register_criterion",),
    "masking.methods": ("EdgePopup", "Method", "Patterns", "Supermask", "register_method"),
    "masks": ("MaskOverlap", "apply_masks", "load_masks", "mask_overlap", "save_masks"),
    "one_call": ("find_jackpot",),
    "pruner": ("LotteryJackpotPruner",),
    "search.match_dense": ("MatchDense",),
    "sparse_training_pruner": ("SparseTrainingPruner",),
    "storage.base_folder": ("BaseFolder",),
    "storage.sparse_checkpoint": ("load_sparse", "save_sparse"),
    "storage.ticket": ("Ticket", "load_ticket", "save_ticket"),
    "storage.ticket_box": ("TicketBox",),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
