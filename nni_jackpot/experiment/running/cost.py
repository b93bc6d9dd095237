"""What the methods of a run cost: seconds, peak memory and epochs; and whether they change weights."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.masks import Masks, mask_overlap, named_masks

_PROCESS = Path("/proc/self")


@dataclass
class Cost:
    """Seconds and peak memory of a block of code.

    Attributes
    ----------
    seconds
        Time; None if not known, as for a block that continues an interrupted one.
    peak_memory_bytes
        Peak memory during the block: what PyTorch has allocated on the GPU, or else the resident memory of
        the process. None if the system does not tell.
    tokens
        Tokens, or images, of calibration data; None for methods that train.
    """

    seconds: float | None = 0.0
    peak_memory_bytes: int | None = None
    tokens: int | None = None

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of two blocks, one after the other."""
        peaks = [peak for peak in (self.peak_memory_bytes, other.peak_memory_bytes) if peak is not None]
        is_known = self.seconds is not None and other.seconds is not None
        return Cost(
            (self.seconds or 0.0) + (other.seconds or 0.0) if is_known else None,
            max(peaks, default=None),
            self.tokens,
        )


@contextmanager
def measured(device: torch.device, tokens: int | None = None) -> Iterator[Cost]:
    """Yield the cost of the block, which is known at its end; blocks must not be nested."""
    cost = Cost(tokens=tokens)
    is_known = _reset_peak(device)
    began = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - began
    cost.peak_memory_bytes = _peak(device) if is_known else None


def _reset_peak(device: torch.device) -> bool:
    """Let the peak memory start from the current memory; return False if the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    _return_memory()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # Linux: resets the peak of the resident memory
    except OSError:
        return False
    return True


def _return_memory() -> None:
    """Return freed memory to the system, so that the work before does not count in the peak."""
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc
        library.malloc_trim(0)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def total_epochs(config: RunConfig, kind: str, epochs: int) -> int | None:
    """Return the epochs of a method, with those of pre-training if the method needs pre-trained weights.

    Parameters
    ----------
    config
        The run.
    kind
        The kind of the method's row.
    epochs
        Epochs after pre-training.

    Returns
    -------
    int or None
        None if the weights were pre-trained elsewhere, for an unknown number of epochs.
    """
    method = config.compared.get(kind)
    if method is not None and method.from_scratch and not _uses_weights(config, method.start):
        return epochs
    elsewhere = [config.pretrain.checkpoint, getattr(config.model, "weights", None)]
    if any(elsewhere) or hasattr(config.model, "task"):  # networks of transformers have their weights
        return None
    return config.pretrain.epochs + epochs


def _uses_weights(config: RunConfig, start: str) -> bool:
    """Return True if the masks at the start depend on the pre-trained weights."""
    return start == "jackpot" or (start == "initial" and config.search.init != "random")


def changes_weights(model: nn.Module, dense: Mapping[str, Tensor], masks: Masks) -> bool:
    """Return True if a parameter of a model differs from the dense one under the masks."""
    kept = named_masks(masks)
    for name, parameter in model.named_parameters():
        before, mask = dense[name], kept.get(name)
        if not torch.equal(parameter, before if mask is None else before * mask.to(before)):
            return True
    return False


def with_overlap(row: Row, masks: Masks | None, jackpot: Masks) -> Row:
    """Return a row with the overlap of its masks with the jackpot's; without masks, the row itself."""
    if masks is None:
        return row
    same = {
        module: {name: jackpot[module][name] for name in targets} for module, targets in masks.items()
    }  # the jackpot's masks have some of ones for what is not pruned, such as biases
    return replace(row, overlap=mask_overlap(masks, same).total)
