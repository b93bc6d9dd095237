"""The pruning criteria that a search can start from (Appendix A): targets in, importance out.

A criterion maps the weights of all targets at once to importances of the same shapes; larger means more
important. All targets at once, because some criteria need the whole network's gradient.
"""

from nni_jackpot.masking.criteria.data_free import magnitude, random
from nni_jackpot.masking.criteria.of_inputs import sparsegpt, wanda
from nni_jackpot.masking.criteria.of_losses import grasp, obd, snip, taylor
from nni_jackpot.masking.criteria.registry import (
    CRITERIA,
    EVIDENCE,
    Criterion,
    Importance,
    Losses,
    needs_of,
    register_criterion,
)

__all__ = [
    "CRITERIA",
    "EVIDENCE",
    "Criterion",
    "Importance",
    "Losses",
    "grasp",
    "magnitude",
    "needs_of",
    "obd",
    "random",
    "register_criterion",
    "snip",
    "sparsegpt",
    "taylor",
    "wanda",
]
