"""Random weights in the place of those that torchvision publishes; no test of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor


def publish(name: str, home: Path, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Have IMAGENET1K_V1 of a network be random weights, in a file under the name of its hash.

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
