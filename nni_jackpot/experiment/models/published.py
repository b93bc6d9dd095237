"""Published weights of torchvision: the very file that its name tells, read without running code of it."""

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
    """Return where the file of an address is kept, by PyTorch's rule."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


@contextmanager
def read_safely(weights: Any) -> Iterator[None]:
    """Have torchvision's builders get weights by `state_of`, for the block.

    Torchvision checks the hash of what it downloads alone, and unpickles what lies there with full trust.
    """
    weights.get_state_dict = lambda *_, **__: state_of(weights.url)
    try:
        yield
    finally:
        del weights.get_state_dict


def state_of(url: str) -> Any:
    """Return the state dict at an address, from its file if it has been fetched already.

    Raises
    ------
    CheckpointError
        If the file's SHA-256 does not begin as its name says, or it holds more than tensors.
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
