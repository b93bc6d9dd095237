"""The form ``csr``: linear layers and 1x1 convolutions that skip zeros, on an x86 CPU."""

from __future__ import annotations

from torch import nn

from nni_jackpot.speedup.csr import sparse_csr
from nni_jackpot.speedup.forms.form import Jackpot, register_form
from nni_jackpot.speedup.forms.program import Program
from nni_jackpot.speedup.matrices import masked_matrices, nothing_to_do


@register_form("csr")
class Csr(Program):
    """Sparse matrices, by `nni_jackpot.speedup.sparse_csr`; to run it, import nni_jackpot.speedup."""

    def check(self, jackpot: Jackpot) -> None:
        """Refuse masks without a linear layer or 1x1 convolution."""
        if not masked_matrices(jackpot.model, jackpot.masks):
            raise nothing_to_do()

    def converted(self, jackpot: Jackpot) -> nn.Module:
        """Return the network with sparse layers."""
        return sparse_csr(jackpot.model, jackpot.masks)
