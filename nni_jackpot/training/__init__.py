"""Training of weights under masks, by methods of the literature: one file for each method."""

from nni_jackpot.training.initial import initial_masks
from nni_jackpot.training.loop import SparseTraining
from nni_jackpot.training.method import (
    DENSE,
    TRAINING_METHODS,
    Start,
    Step,
    TrainingMethod,
    register_training_method,
)
from nni_jackpot.training.methods import DSR, SET, DeepR, Gradual, RigL, SparseMomentum

__all__ = [
    "DENSE",
    "DSR",
    "SET",
    "TRAINING_METHODS",
    "DeepR",
    "Gradual",
    "RigL",
    "SparseMomentum",
    "SparseTraining",
    "Start",
    "Step",
    "TrainingMethod",
    "initial_masks",
    "register_training_method",
]
