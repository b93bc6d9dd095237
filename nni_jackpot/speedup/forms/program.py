"""PyTorch programs: network and weights in one file, which ``torch.export.load`` runs."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from nni_jackpot.errors import SpeedupError, first_line
from nni_jackpot.speedup.forms.form import Form, Jackpot, Runner
from nni_jackpot.speedup.outputs import copy_of


class Program(Form):
    """A converted network as a program of ``torch.export``, for batches of any size."""

    suffix: ClassVar[str] = ".pt2"

    @abstractmethod
    def converted(self, jackpot: Jackpot) -> nn.Module:
        """Return the converted network."""

    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Convert the network, and write its program."""
        model = self.converted(jackpot)
        # With the doubled batch: a batch of one would become a constant.
        twice, dynamic = jackpot.example.twice()
        try:
            program: Any = torch.export.export(
                copy_of(model), twice.args, twice.kwargs, dynamic_shapes=dynamic.shapes_for(model)
            )
            torch.export.save(program, path)
        except Exception as error:  # tracing may raise any error
            reason = first_line(error.__cause__ or error)
            raise SpeedupError(f"torch.export cannot write the network: {reason}") from error

    def load(self, path: Path, jackpot: Jackpot) -> Runner:
        """Load the program."""
        return torch.export.load(path).module()
