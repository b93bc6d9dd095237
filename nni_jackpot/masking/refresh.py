"""Updates of masks to their scores, for all parameters of a search at once.

There are two backends. Triton's kernels update all masks on a GPU together; PyTorch updates them one by one
on a CPU, and on an accelerator with one wait of the host for all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_weights import without_gradients
from nni_jackpot.masking.topk import swap_at_most, update_top, update_tops

if TYPE_CHECKING:  # masked_parameter imports this file
    from nni_jackpot.masking.masked_parameter import MaskedParameter

_logger = logging.getLogger(__name__)


class Mode(Enum):
    """When a mask is updated; a search sets the mode at its phase changes."""

    LAZY = "on use, if the scores may have changed"
    EAGER = "by the search, after every step"
    DEFERRED = "on use; training sees soft masks, which the search updates after every step"


@dataclass
class LastChange:
    """The grains that entered or left a mask in its last update.

    Attributes
    ----------
    places
        Flat places of grains, or a boolean for each grain; None if the mask has not been updated yet.
    is_accepted
        Whether a finite loss has been seen under the mask since.
    """

    places: Tensor | None = None
    is_accepted: bool = True

    @property
    def count(self) -> int | Tensor:
        """Number of grains that changed; a tensor if the places are on an accelerator."""
        if self.places is None:
            return 0
        return self.places.count_nonzero() if self.places.dtype == torch.bool else len(self.places)

    def undo(self, mask: Tensor, grains: Grains) -> None:
        """Restore the mask of the last finite loss, in place."""
        if not self.is_accepted and self.places is not None:
            kept = grains.of_mask(mask)
            kept.view(-1)[self.places] ^= True
            mask.copy_(grains.expand(kept))
        self.is_accepted = True


@without_gradients
def refresh(parameters: Iterable[MaskedParameter], written: Container[MaskedParameter] = ()) -> None:
    """Update masks and cached weights after a step of the search.

    Deferred masks are updated when they are read next; only their soft masks are updated now.

    Parameters
    ----------
    parameters
        The parameters whose scores have moved.
    written
        Parameters whose cached weights are under the soft mask of the new scores already.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; its mask is then unchanged.
    """
    deferred: list[MaskedParameter] = []
    due: list[MaskedParameter] = []
    for parameter in parameters:
        parameter.note_change()
        if parameter in written:
            increment_version(parameter.cache.values)  # type: ignore[union-attr]
            parameter.renew_cache()
            continue
        (deferred if parameter.mode is Mode.DEFERRED else due).append(parameter)
    _update_soft(deferred)
    update_masks(due)


@without_gradients
def update_masks(parameters: Iterable[MaskedParameter]) -> None:
    """Update masks to the current scores, whatever the mode; raises as `refresh`."""
    together = []
    for parameter in parameters:
        grains = parameter.grains
        if is_accelerator(parameter.score.device) and parameter.swap_limit is None:
            together.append(parameter)
        elif grains.scaler is None and grains.rows == 1 and parameter.swap_limit is None:
            _update_weights(parameter)
        else:
            _update_grains(parameter)
    by_kernels, others = _kernel_groups(together)
    for group in by_kernels:
        if group[0].temperature:  # the cached weights are under the soft mask
            others += group
        else:
            others += _update_by_kernels(group)
    _update_together(others)


@without_gradients
def build_caches(parameters: Sequence[MaskedParameter]) -> None:
    """Build the masked weights of a search, before its first step or after scores and masks were restored."""
    _update_soft([p for p in parameters if p.mode is Mode.DEFERRED])
    for parameter in parameters:
        if isinstance(parameter.weight, nn.Parameter):
            parameter.build_cache(parameter.weight)


def _update_weights(parameter: MaskedParameter) -> None:
    """Update a mask of single weights, and the cached weights at the few places that change."""
    mask, is_fresh = parameter.mask, parameter.is_cache_fresh
    places = update_top(
        parameter.score, parameter.keep, mask, n_kept=parameter.known_kept, threshold=parameter.threshold
    )
    parameter.mark_fresh(places)
    cache = parameter.cache
    is_patched = cache is not None and is_fresh and not parameter.temperature and len(places) > 0
    if is_patched and cache.weight.is_contiguous():  # type: ignore[union-attr]
        weight = cache.weight.view(-1)  # type: ignore[union-attr]
        parameter.writable_cache().view(-1)[places] = weight[places] * mask.view(-1)[places]
        parameter.renew_cache()
    parameter.update_cache()


def _update_grains(parameter: MaskedParameter) -> None:
    """Update a mask of channels, blocks or rows, or one whose swaps are limited."""
    grains = parameter.grains
    before = grains.of_mask(parameter.mask)
    scores = parameter.score.detach().view(grains.score_shape)
    kept = grains.select(scores, parameter.keep, previous=before)
    if parameter.swap_limit is not None:
        kept = swap_at_most(kept, before, scores, parameter.swap_limit)
    parameter.replace_mask(kept, before)


def _update_together(parameters: Sequence[MaskedParameter]) -> None:
    """Update masks on an accelerator, of any grains, with one wait of the host.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; all masks are then unchanged.
    """
    sets = []
    for parameter in parameters:
        grains = parameter.grains
        scores = grains.by_row(parameter.score.detach().view(grains.score_shape))
        kept = grains.by_row(grains.of_mask(parameter.mask))  # a view of the mask, or a copy
        sets.append((scores, parameter.keep // grains.rows, kept if grains.are_rows else kept.clone()))
    for parameter, (*_, kept), changed in zip(parameters, sets, update_tops(sets), strict=True):
        grains = parameter.grains
        if not grains.are_rows:
            parameter.mask.copy_(grains.expand(grains.of_rows(kept)))
        parameter.mark_fresh(grains.of_rows(changed).reshape(-1))
        parameter.update_cache()


def _update_soft(parameters: Sequence[MaskedParameter]) -> None:
    """Update the cached weights under soft masks; the masks themselves stay behind."""
    by_kernels, others = _kernel_groups(parameters)
    for group in by_kernels:
        kernels().weigh([_layer(parameter) for parameter in group], group[0].temperature)
        for parameter in group:
            increment_version(parameter.cache.values)  # type: ignore[union-attr]
            parameter.renew_cache()
    for parameter in others:
        parameter.update_cache()


def _update_by_kernels(parameters: Sequence[MaskedParameter]) -> list[MaskedParameter]:
    """Update masks of single weights on a GPU; return those with too many equal scores for the kernels."""
    layers = [_layer(parameter) for parameter in parameters]
    changes = [_places_buffer(parameter) for parameter in parameters]
    are_fresh = [parameter.is_cache_fresh for parameter in parameters]
    left = []
    for parameter, is_done, is_fresh, changed in zip(
        parameters, kernels().update_masks(layers, changes), are_fresh, changes, strict=True
    ):
        if not is_done:
            left.append(parameter)
            continue
        increment_version(parameter.mask)
        parameter.mark_fresh(changed)
        if is_fresh:
            increment_version(parameter.cache.values)  # type: ignore[union-attr]
            parameter.renew_cache()
        else:
            parameter.update_cache()
    return left


def _places_buffer(parameter: MaskedParameter) -> Tensor:
    """Return a flat boolean tensor for the places that change; that of the last update, if there is one."""
    before, mask = parameter.last_change.places, parameter.mask
    is_fit = before is not None and before.dtype == torch.bool and before.device == mask.device
    return before if is_fit else torch.empty_like(mask).view(-1)  # type: ignore[return-value]


def _kernel_groups(
    parameters: Iterable[MaskedParameter],
) -> tuple[list[list[MaskedParameter]], list[MaskedParameter]]:
    """Return groups of parameters that the Triton kernels can update together, and all others."""
    groups: dict[Any, list[MaskedParameter]] = defaultdict(list)
    others = []
    for parameter in parameters:
        cache, grains, score = parameter.cache, parameter.grains, parameter.score
        is_fit = has_kernels(score.device) and score.dtype == torch.float32 and score.is_contiguous()
        is_fit = is_fit and grains.are_rows and grains.rows == 1
        is_fit = is_fit and cache is not None and cache.values.device == score.device
        if is_fit and kernels().layout_of(cache.weight) is not None:  # type: ignore[union-attr]
            groups[score.device, cache.weight.dtype, parameter.temperature].append(parameter)  # type: ignore[union-attr]
        else:
            others.append(parameter)
    return list(groups.values()), others


def _layer(parameter: MaskedParameter) -> Any:
    values = parameter.writable_cache()
    weight = parameter.cache.weight  # type: ignore[union-attr]
    return kernels().Layer(parameter.score.detach(), parameter.keep, parameter.mask, weight, values)


def is_accelerator(device: torch.device) -> bool:
    """Return True if the host should not wait for a device more often than necessary."""
    return device.type != "cpu"


@lru_cache
def has_kernels(device: torch.device) -> bool:
    """Return True if a device runs the kernels: NVIDIA's, with Triton and a C compiler for Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        kernels().try_out(device)
    except Exception as error:  # any failure of Triton leaves the other backend
        _logger.warning("Masks are updated layer by layer, which takes longer: Triton fails (%s)", error)
        return False
    return True


def kernels() -> Any:
    """Return the module `nni_jackpot.masking.triton_kernels`, which needs Triton to be imported."""
    return importlib.import_module("nni_jackpot.masking.triton_kernels")
