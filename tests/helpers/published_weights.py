"""Random weights in place of torchvision's published weights; not a test."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor


def publish(name: str, home: Path, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Let IMAGENET1K_V1 of a network be random weights, in a file named after its hash.

    Parameters
    ----------
    name
        Of the network.
    home
        Becomes the home of torch.hub.
    patch
        Undoes it all.
    """
    patch.setenv("TORCH_HOME", str(home))
    state = torchvision.models.get_model(name).state_dict()
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "made.pth")
    digest = hashlib.sha256((folder / "made.pth").read_bytes()).hexdigest()
    path = (folder / "made.pth").rename(folder / f"{name}-{digest[:8]}.pth")
    published = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    patch.setattr(published.value, "url", f"https://download.pytorch.org/models/{path.name}")
    return state
