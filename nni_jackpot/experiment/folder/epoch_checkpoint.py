"""Checkpoints of a training of weights, written after each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_jackpot.runtime.distributed import all_gather, rank
from nni_jackpot.runtime.resume import (
    damage_told,
    random_states,
    read_state,
    remove_files,
    set_random_states,
    write_state,
)


class EpochFile:
    """The state of a training after its last complete epoch.

    Parameters
    ----------
    path
        The file; rank 0 writes it and all ranks read it.
    depends_on
        What the training depends on, by name; a file of another training is refused.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self._depends_on = depends_on

    def load(self, parts: Mapping[str, Any]) -> int:
        """Restore parts and random states; return the number of completed epochs, 0 without a file.

        Parameters
        ----------
        parts
            Objects with a state dict, by name.

        Raises
        ------
        CheckpointError
            If the file is damaged, or belongs to another training.
        """
        if not self.path.exists():
            return 0
        saved = read_state(self.path, "training", self._depends_on)
        with damage_told(self.path):
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            set_random_states(saved["random"][rank()])
            return int(saved["epochs"])

    def save(self, epochs: int, parts: Mapping[str, Any]) -> None:
        """Write the file, after a number of epochs."""
        state = {
            "epochs": epochs,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "random": all_gather(random_states()),
        }
        write_state(self.path, self._depends_on, state)

    def remove(self) -> None:
        """Remove the file, if it exists."""
        remove_files(self.path)
