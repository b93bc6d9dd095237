"""Published weights of torchvision: verified by the hash in the file's name; no code in it is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from nni_jackpot.errors import CheckpointError
from nni_jackpot.runtime.files import digest_of_file, load_tensors, made_folders


def place_of(url: str) -> Path:
    """Return the path of a URL's file in PyTorch's cache."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


@contextmanager
def read_safely(weights: Any) -> Iterator[None]:
    """Make torchvision's builders load weights by `state_of`, for the block.

    Torchvision verifies the hash of a download only, and unpickles a file in its cache without checks.
    """
    weights.get_state_dict = lambda *_, **__: state_of(weights.url)
    try:
        yield
    finally:
        del weights.get_state_dict


def state_of(url: str) -> Any:
    """Return the state dict at a URL, from its file if it has been downloaded already.

    Raises
    ------
    CheckpointError
        If the file's SHA-256 does not begin with the hash in its name, or the file holds more than tensors.
    """
    path = place_of(url)
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)
    wanted = named[1] if named else ""
    if not path.exists():
        with made_folders(path.parent):
            torch.hub.download_url_to_file(url, str(path), wanted or None)
    elif not (found := digest_of_file(path)).startswith(wanted):
        raise CheckpointError(
            f"{path} is damaged, or another file: its SHA-256 begins with {found[: len(wanted)]}, its name "
            f"says {wanted}"
        )
    return load_tensors(path, "file of weights")
