"""The form ``hf``: a folder that ``from_pretrained`` of transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from nni_jackpot.errors import SpeedupError, first_line
from nni_jackpot.speedup.forms.form import Form, Jackpot, Runner, register_form


@register_form("hf")
class HuggingFace(Form):
    """A folder of safetensors with zeros, config and tokenizer; takes all masks of parameters."""

    tolerance: ClassVar[float | None] = 0.0

    def check(self, jackpot: Jackpot) -> None:
        """Refuse networks that are not of transformers."""
        if not (hasattr(jackpot.model, "save_pretrained") and hasattr(jackpot.model, "config")):
            raise SpeedupError(
                f"hf is for networks of transformers, which have save_pretrained, and not for "
                f"{type(jackpot.model).__name__}: choose onnx"
            )

    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Save network and tokenizer."""
        model: Any = jackpot.model
        model.save_pretrained(path)
        if jackpot.tokenizer is not None:
            jackpot.tokenizer.save_pretrained(path)

    def load(self, path: Path, jackpot: Jackpot) -> Runner:
        """Load the folder, and check that every tensor is the same bit for bit."""
        own: Any = jackpot.model
        try:
            found = (
                type(own)
                .from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=own.dtype)
                .eval()
            )
        except Exception as error:  # transformers raises the errors of its readers
            raise SpeedupError(f"from_pretrained cannot load the folder: {first_line(error)}") from error
        state = found.state_dict()
        for name, tensor in own.state_dict().items():
            if name not in state or not torch.equal(state[name], tensor):
                raise SpeedupError(f"from_pretrained loads another {name} than the masked network has")
        return found
