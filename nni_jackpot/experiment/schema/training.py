"""Settings of the training of weights, which several sections of a config share."""

from __future__ import annotations

from dataclasses import dataclass

from nni_jackpot.experiment.schema.rules import PATH, Invalid
from nni_jackpot.runtime.settings import Rule, between, option

EPOCHS = between(0, 10**6)
# Beyond these bounds a float32 network overflows after a step or two.
RATE = Rule("> 0 and <= 1e30", lambda value: 0 < value <= 1e30)
_DECAY = Rule(">= 0 and <= 1e30", lambda value: 0 <= value <= 1e30)
_MOMENTUM = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of weights by SGD with a cosine schedule."""

    epochs: int = option("passes over the training data", EPOCHS)
    lr: float = option("learning rate at the start", RATE)
    momentum: float = option("momentum of SGD", _MOMENTUM, 0.9)
    weight_decay: float = option("weight decay of SGD", _DECAY, 5e-4)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Where the pre-trained weights come from."""

    epochs: int = option("passes over the training data; required without a checkpoint", EPOCHS, None)
    lr: float = option("learning rate at the start; required with epochs", RATE, None)
    checkpoint: str | None = option(
        "file or folder of weights: a state dict, a checkpoint of a training script or safetensors; null to "
        "train and cache",
        PATH,
        None,
    )
    cache: str = option("folder of the weights trained once", PATH, "runs/pretrained", affects="nothing")

    def __post_init__(self) -> None:
        for name, unused in (("epochs", 0), ("lr", 0.1)):
            if getattr(self, name) is not None:
                continue
            if self.checkpoint is None and self.epochs != 0:
                raise Invalid(name, "is missing, allowed: a number, or a checkpoint, which needs no training")
            object.__setattr__(self, name, unused)
