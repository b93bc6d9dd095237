"""Training of weights goes on after the last whole epoch, if it is interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nni_jackpot.errors import CheckpointError
from nni_jackpot.files import load_tensors, replace_file
from nni_jackpot.ranks import of_all, rank, world
from nni_jackpot.resuming import random_states, refuse_other, set_random_states


class EpochFile:
    """What a training was like after its last whole epoch.

    Parameters
    ----------
    path
        The file; rank 0 writes it and all ranks read it.
    settings
        What the training depends on, by name: a file of other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = {**settings, "the number of processes": world()}

    def load(self, parts: Mapping[str, Any]) -> int:
        """Put parts and random states where they were, and return after how many epochs; 0 for no file.

        Parameters
        ----------
        parts
            What has a state dict, by name.

        Raises
        ------
        CheckpointError
            If the file is damaged, or of another training.
        """
        if not self.path.exists():
            return 0
        saved = load_tensors(self.path, "checkpoint of a training")
        if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
            raise CheckpointError(f"{self.path} is not a checkpoint of a training")
        refuse_other(self.path, "training", saved["settings"], self._settings)
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        set_random_states(saved["random"][rank()])
        return saved["epochs"]

    def save(self, epochs: int, parts: Mapping[str, Any]) -> None:
        """Write the file, after so many epochs."""
        state = {
            "settings": self._settings,
            "epochs": epochs,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "random": of_all(random_states()),
        }
        if rank() == 0:
            replace_file(self.path, lambda aside: torch.save(state, aside))

    def remove(self) -> None:
        """Remove the file, if it is there."""
        if rank() == 0:
            self.path.unlink(missing_ok=True)
