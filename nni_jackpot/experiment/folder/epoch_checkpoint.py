"""Training of weights goes on after the last whole epoch, if it is interrupted."""

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
    """What a training was like after its last whole epoch.

    Parameters
    ----------
    path
        The file; rank 0 writes it and all ranks read it.
    depends_on
        What the training depends on, by name: a file of another one is refused.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self._depends_on = depends_on

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
        saved = read_state(self.path, "training", self._depends_on)
        with damage_told(self.path):
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            set_random_states(saved["random"][rank()])
            return int(saved["epochs"])

    def save(self, epochs: int, parts: Mapping[str, Any]) -> None:
        """Write the file, after so many epochs."""
        state = {
            "epochs": epochs,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "random": all_gather(random_states()),
        }
        write_state(self.path, self._depends_on, state)

    def remove(self) -> None:
        """Remove the file, if it is there."""
        remove_files(self.path)
