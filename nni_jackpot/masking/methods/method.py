"""What a search method consists of: settings, and how masks follow scores under them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.runtime.registry import Registry
from nni_jackpot.runtime.settings import Rule, option, validate

# Beyond these a network of float32 computes with numbers that are none, after a step or two.
RATE = Rule(">= 0 and <= 1e6", lambda value: 0 <= value <= 1e6)
DECAY = Rule(">= 0 and <= 1e6", lambda value: 0 <= value <= 1e6)
LR = 0.003
MOMENTUM = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)


class MaskSchedule(NamedTuple):
    """How masks change over a search; the default is masks at full sparsity throughout.

    Attributes
    ----------
    ramp_end
        Progress, in [0, 1], at which the masks have all their zeros.
    temperature
        Temperature of the soft masks at the start, which falls to 0 in a straight line; 0 for none.
    anneal_end
        Progress at which the temperature is 0.
    reallocate
        Whether targets of one budget group trade weights during the search.
    swap_limit
        Largest share of a target's kept grains that one step may replace; None for no limit.
    """

    ramp_end: float = 0.0
    temperature: float = 0.0
    anneal_end: float = 0.0
    reallocate: bool = False
    swap_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of a search method; each method is a subclass in a separate file.

    Attributes
    ----------
    name
        Name under which the method is registered.
    parameter_class
        Class of the masked parameters, which decides what training sees.
    """

    name: ClassVar[str]
    parameter_class: ClassVar[type[MaskedParameter]] = MaskedParameter

    lr: float | None = option(
        "learning rate of the scores at the start; null for one that suits the network", RATE, None
    )
    momentum: float = option("momentum of the SGD that trains the scores", MOMENTUM, 0.9)
    weight_decay: float = option("weight decay of the scores", DECAY, 0.0)
    normalize: bool = option(
        "whether gradients are scaled to a root mean square of 1 over each budget group", default=True
    )

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def recipes(cls) -> dict[str, Method]:
        """Return the named sets of settings; the first is the default."""
        return {"default": cls()}

    def suited_to(self, has_batch_norm: bool) -> Method:
        """Return the settings with values that suit a network in place of None."""
        return self if self.lr is not None else replace(self, lr=LR)

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial scores of kept and of pruned grains."""
        return 1.0, 0.95

    @property
    def schedule(self) -> MaskSchedule:
        """How the masks change over the search."""
        return MaskSchedule()


METHODS: Registry[type[Method]] = Registry("method")
register_method = METHODS.register_class
