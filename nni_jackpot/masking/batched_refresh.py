"""Masks of many targets that follow their scores at once; each alone would keep the host waiting."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nni_jackpot.masking.methods.edge_popup import RelaxedMask, Target, refresh_sets

_logger = logging.getLogger(__name__)


def refresh_together(targets: Iterable[Target]) -> None:
    """Let masks follow their scores, each of ``(relaxed mask, score, mask)``.

    An accelerator is waited for once, and not once a target.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; its mask is then left as it was.
    """
    together = []
    for relaxed, score, mask in targets:
        if relaxed.goes_with_others(score):
            together.append((relaxed, score, mask))
        else:
            relaxed.refresh_now(score, mask)
    by_kernels, others = _kernel_groups(together)
    for group in by_kernels:
        if group[0][0].temperature:  # the values are those of the soft mask
            others += group
        else:
            others += _refresh_by_kernels(group)
    refresh_sets(others)


def wait_together(targets: Iterable[Target]) -> None:
    """Let soft masks follow their scores, the masks themselves not; for those that can wait."""
    by_kernels, others = _kernel_groups(targets)
    for group in by_kernels:
        kernels().weigh([_layer(*target) for target in group], group[0][0].temperature)
        for relaxed, score, _ in group:
            relaxed.take_values(score, None)
    for relaxed, score, mask in others:
        relaxed.wait(score, mask)


def _refresh_by_kernels(targets: Sequence[Target]) -> list[Target]:
    """Refresh masks of single weights on a GPU; return those that have too many equal scores for it."""
    layers = [_layer(*target) for target in targets]
    changes = [relaxed.changes(mask) for relaxed, _, mask in targets]
    are_fresh = [relaxed.has_values(mask) for relaxed, _, mask in targets]
    left = []
    for target, is_done, is_fresh, changed in zip(
        targets, kernels().update_masks(layers, changes), are_fresh, changes, strict=True
    ):
        relaxed, score, mask = target
        if not is_done:
            left.append(target)
            continue
        increment_version(mask)
        relaxed.settle(score, changed)
        if is_fresh:
            relaxed.take_values(score, mask)
        else:
            relaxed.remake(score, mask)
    return left


def _kernel_groups(targets: Iterable[Target]) -> tuple[list[list[Target]], list[Target]]:
    """Return groups of targets that the Triton kernels can refresh together, and all other targets."""
    groups: dict[Any, list[Target]] = defaultdict(list)
    others = []
    for target in targets:
        relaxed, score, _ = target
        masked, grains = relaxed.masked, relaxed.grains
        is_fit = has_kernels(score.device) and score.dtype == torch.float32 and score.is_contiguous()
        is_fit = is_fit and grains.are_rows and grains.rows == 1 and masked is not None
        is_fit = is_fit and masked.values.device == score.device  # type: ignore[union-attr]
        if is_fit and kernels().layout_of(masked.weight) is not None:  # type: ignore[union-attr]
            groups[score.device, masked.weight.dtype, relaxed.temperature].append(target)  # type: ignore[union-attr]
        else:
            others.append(target)
    return list(groups.values()), others


def _layer(relaxed: RelaxedMask, score: Tensor, mask: Tensor) -> Any:
    values = relaxed.lend_values()
    assert relaxed.masked is not None
    return kernels().Layer(score.detach(), relaxed.keep, mask, relaxed.masked.weight, values)


@lru_cache
def has_kernels(device: torch.device) -> bool:
    """Return whether a device runs the kernels: NVIDIA's, where there are Triton and a C compiler for it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        kernels().try_out(device)
    except Exception as error:  # whatever Triton lacks, there is another way
        _logger.warning("Masks are refreshed layer by layer, which takes longer: Triton fails (%s)", error)
        return False
    return True


def kernels() -> Any:
    """Return the module `nni_jackpot.masking.triton_kernels`, which can be imported only where Triton is."""
    return importlib.import_module("nni_jackpot.masking.triton_kernels")
