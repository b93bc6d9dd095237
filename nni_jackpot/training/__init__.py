"""Training of weights under masks, by methods of the literature: one file for each method."""

from nni_jackpot.training.initial import initial_masks
from nni_jackpot.training.loop import SparseTraining
from nni_jackpot.training.losses import losses_on
from nni_jackpot.training.method import (
    DENSE,
    TRAINING_METHODS,
    Start,
    Step,
    TrainingMethod,
    register_training_method,
)
from nni_jackpot.training.methods import (
    DSR,
    LT,
    OBD,
    SET,
    SNIP,
    DeepR,
    Gradual,
    GraSP,
    RigL,
    SparseMomentum,
    Static,
)

__all__ = [
    "DENSE",
    "DSR",
    "LT",
    "OBD",
    "SET",
    "SNIP",
    "TRAINING_METHODS",
    "DeepR",
    "GraSP",
    "Gradual",
    "RigL",
    "SparseMomentum",
    "SparseTraining",
    "Start",
    "Static",
    "Step",
    "TrainingMethod",
    "initial_masks",
    "losses_on",
    "register_training_method",
]
