"""The form ``shrink``: a smaller dense network, without the channels that are masked as a whole."""

from __future__ import annotations

from torch import nn

from nni_jackpot.speedup.channels import shrink
from nni_jackpot.speedup.forms.form import Jackpot, register_form
from nni_jackpot.speedup.forms.program import Program


@register_form("shrink")
class Shrink(Program):
    """A smaller dense network, by `nni_jackpot.speedup.shrink`; masks must contain whole channels."""

    def converted(self, jackpot: Jackpot) -> nn.Module:
        """Return the smaller network."""
        return shrink(jackpot.model, jackpot.masks, jackpot.example.inputs)
