"""Triton kernels that update the masks of many layers at once; the number of launches is constant.

Here a layer is a target with one threshold and one score per weight. Scores are float32 and contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.soft_mask import EQUAL, stride_of_sample

# Elements per program, and per iteration of its loop.
_BLOCK = tl.constexpr(1 << 14)
_TILE = tl.constexpr(1 << 12)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class _Layers:
    """Addresses of the layers' tensors, and the block of each program; tensors are on the GPU."""

    addresses: Tensor  # int64 (kinds of tensors, layers)
    sizes: Tensor  # int64 (layers,)
    layer_of: Tensor  # int32 (programs,)
    start_of: Tensor  # int64 (programs,)
    programs: int

    @classmethod
    def of(cls, *kinds: Sequence[Tensor]) -> _Layers:
        """Describe layers by lists of their tensors: all scores, all masks, and so on."""
        sizes = tuple(scores.numel() for scores in kinds[0])
        addresses = tuple(tuple(tensor.data_ptr() for tensor in kind) for kind in kinds)
        return _described(addresses, sizes, kinds[0][0].device)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first arguments of every kernel."""
        return self.addresses, self.sizes, self.layer_of, self.start_of


# Cached, since tensors do not move during a search: nothing has to be sent to the GPU.
@lru_cache(maxsize=16)
def _described(
    addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device
) -> _Layers:
    programs = [-(-size // _BLOCK.value) for size in sizes]
    layer_of = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    start_of = torch.cat([torch.arange(n, dtype=torch.int64) * _BLOCK.value for n in programs])
    return _Layers(
        torch.tensor(addresses).to(device),
        torch.tensor(sizes).to(device),
        layer_of.to(device),
        start_of.to(device),
        sum(programs),
    )


@lru_cache(maxsize=16)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as int32 on a device, without synchronization."""
    on_host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


@triton.jit
def _key(score):  # type: ignore[no-untyped-def]
    """Map float32 scores to int32 keys in the same order; on a score's bits the map is its own inverse."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # maps -0.0 to 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count_digits(  # type: ignore[no-untyped-def]
    addresses, sizes, layer_of, start_of, prefix, counts, nans, SHIFT: tl.constexpr
):
    """Count the 8-bit digits at SHIFT per layer, over the keys that start with the prefix (radix select)."""
    layer = tl.load(layer_of + tl.program_id(0))
    start = tl.load(start_of + tl.program_id(0))
    scores = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    size = tl.load(sizes + layer)
    found = tl.zeros([512], dtype=tl.int32)
    n_nans = 0
    for tile in range(0, _BLOCK, _TILE):
        at = start + tile + tl.arange(0, _TILE)
        counted = at < size
        score = tl.load(scores + at, mask=counted, other=0.0)
        key = _key(score)
        if SHIFT == 24:
            digit = (key >> 24) + 128
            n_nans += tl.sum((score != score).to(tl.int32))
        else:
            counted = counted & (key >> (SHIFT + 8) == tl.load(prefix + layer))
            digit = (key >> SHIFT) & 255
        # Spread ignored elements over 256 extra bins, since threads that count in one bin serialize.
        found += tl.histogram(tl.where(counted, digit, 256 + (at & 255).to(tl.int32)), 512)
    bins = tl.arange(0, 512)
    tl.atomic_add(counts + layer * 256 + bins, found, mask=(bins < 256) & (found > 0))
    if SHIFT == 24:  # noqa: SIM102  # a compile-time condition, separate from the run-time condition
        if n_nans > 0:
            tl.atomic_add(nans + layer, n_nans)


@triton.jit
def _pick_digit(counts, prefix, rest, surplus, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Append the digit of the smallest kept key to the prefix, and update the number still to keep."""
    layer = tl.program_id(0)
    digit = tl.arange(0, 256)
    count = tl.load(counts + layer * 256 + digit)
    kept = tl.load(rest + layer)
    picked = tl.max(tl.where(tl.cumsum(count, reverse=True) >= kept, digit, 0))
    kept -= tl.sum(tl.where(digit > picked, count, 0))
    if SHIFT == 24:
        tl.store(prefix + layer, picked - 128)
    else:
        tl.store(prefix + layer, (tl.load(prefix + layer) << 8) | picked)
    tl.store(rest + layer, kept)
    if SHIFT == 0:
        tl.store(surplus + layer, tl.sum(tl.where(digit == picked, count, 0)) - kept)


@triton.jit
def _in_weight(at, planes, pixels):  # type: ignore[no-untyped-def]
    """Return the memory offset of a logical index in a channels-last weight."""
    within = at % (planes * pixels)
    return at - within + (within % pixels) * planes + within // pixels


@triton.jit
def _keep_from(  # type: ignore[no-untyped-def]
    addresses, sizes, layer_of, start_of, layout, smallest, surplus, n_layers, WEIGHT: tl.constexpr
):
    """Keep all keys from the smallest one on, and record changes; layers with surplus ties are skipped."""
    layer = tl.load(layer_of + tl.program_id(0))
    if tl.load(surplus + layer) == 0:
        start = tl.load(start_of + tl.program_id(0))
        scores = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
        masks = tl.load(addresses + n_layers + layer).to(tl.pointer_type(tl.int8))
        changes = tl.load(addresses + 2 * n_layers + layer).to(tl.pointer_type(tl.int8))
        weights = tl.load(addresses + 3 * n_layers + layer).to(tl.pointer_type(WEIGHT))
        values = tl.load(addresses + 4 * n_layers + layer).to(tl.pointer_type(WEIGHT))
        size = tl.load(sizes + layer)
        planes, pixels = tl.load(layout + layer), tl.load(layout + n_layers + layer)
        least = tl.load(smallest + layer)
        for tile in range(0, _BLOCK, _TILE):
            at = start + tile + tl.arange(0, _TILE)
            inside = at < size
            key = _key(tl.load(scores + at, mask=inside, other=0.0))
            kept = (key >= least).to(tl.int8)
            changed = (kept != tl.load(masks + at, mask=inside, other=0)) & inside
            tl.store(masks + at, kept, mask=changed)
            tl.store(changes + at, changed.to(tl.int8), mask=inside)
            there = _in_weight(at, planes, pixels)
            weight = tl.load(weights + there, mask=changed, other=0.0)
            tl.store(values + there, tl.where(kept != 0, weight, 0.0), mask=changed)


@triton.jit
def _take_samples(addresses, strides, numbers, samples, width):  # type: ignore[no-untyped-def]
    """Write a strided sample of each layer's scores into its row, padded with zeros."""
    layer = tl.program_id(0)
    at = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    scores = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    stride = tl.load(strides + layer).to(tl.int64)
    score = tl.load(scores + at * stride, mask=at < tl.load(numbers + layer), other=0.0)
    tl.store(samples + layer * width + at, score, mask=at < width)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    addresses, sizes, layer_of, start_of, layout, smallest, slopes, keeps, n_layers, WEIGHT: tl.constexpr
):
    """Write weights times sigmoid((score - smallest) * slope), or plain weights if all are kept."""
    layer = tl.load(layer_of + tl.program_id(0))
    start = tl.load(start_of + tl.program_id(0))
    scores = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    weights = tl.load(addresses + n_layers + layer).to(tl.pointer_type(WEIGHT))
    values = tl.load(addresses + 2 * n_layers + layer).to(tl.pointer_type(WEIGHT))
    size = tl.load(sizes + layer)
    planes, pixels = tl.load(layout + layer), tl.load(layout + n_layers + layer)
    is_whole = tl.load(keeps + layer) == size
    key = tl.load(smallest + layer)
    threshold = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    slope = tl.load(slopes + layer)
    for tile in range(0, _BLOCK, _TILE):
        at = start + tile + tl.arange(0, _TILE)
        inside = at < size
        score = tl.load(scores + at, mask=inside, other=0.0)
        there = _in_weight(at, planes, pixels)
        weight = tl.load(weights + there, mask=inside, other=0.0)
        soft = tl.where(is_whole, 1.0, tl.sigmoid((score - threshold) * slope))
        tl.store(values + there, (weight * soft).to(WEIGHT), mask=inside)


class Layer(NamedTuple):
    """A layer on the GPU; all tensors have the same shape.

    Attributes
    ----------
    score
        Scores, float32, contiguous.
    keep
        Number of kept weights.
    mask
        Boolean, contiguous.
    weight, values
        The weights and the masked weights: float32, float16 or bfloat16, both in the same layout, which
        `layout_of` supports.
    """

    score: Tensor
    keep: int
    mask: Tensor
    weight: Tensor
    values: Tensor


def try_out(device: torch.device) -> None:
    """Compile and run the kernels on tiny tensors; errors of Triton propagate."""
    score, mask = torch.arange(8.0, device=device), torch.zeros(8, dtype=torch.bool, device=device)
    layer = Layer(score, 4, mask, score, score.clone())
    update_masks([layer], [torch.empty_like(mask)])
    weigh([layer], 1.0)


def layout_of(weight: Tensor) -> tuple[int, int] | None:
    """Return ``(channels, pixels)`` of a contiguous or channels-last weight; None for other layouts."""
    if weight.is_contiguous():
        return max(1, weight.numel()), 1  # with one pixel both layouts are the same
    is_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if is_last is not None and weight.is_contiguous(memory_format=is_last):
        return weight.shape[1], math.prod(weight.shape[2:])
    return None


def _layouts(weights: Sequence[Tensor]) -> Tensor:
    """Return the layouts of weights, int32 (2, layers)."""
    planes, pixels = zip(*map(layout_of, weights), strict=True)
    return _numbers(planes + pixels, weights[0].device)


@dataclass
class _Found:
    """Per layer: key of the smallest kept score, number of equal scores that are not kept, number of NaNs."""

    smallest: Tensor
    surplus: Tensor
    nans: Tensor


def _smallest_kept(layers: Sequence[Layer]) -> _Found:
    """Find the smallest kept score of every layer by radix select, 8 bits at a time."""
    places, device = _Layers.of([layer.score for layer in layers]), layers[0].score.device
    n = len(layers)
    counts = torch.zeros((4, n, 256), dtype=torch.int32, device=device)
    prefix, surplus, nans = torch.zeros((3, n), dtype=torch.int32, device=device)
    rest = _numbers(tuple(layer.keep for layer in layers), device).clone()
    for at, shift in enumerate((24, 16, 8, 0)):
        _count_digits[(places.programs,)](*places.places, prefix, counts[at], nans, shift, num_warps=8)
        _pick_digit[(n,)](counts[at], prefix, rest, surplus, shift, num_warps=4)
    return _Found(prefix, surplus, nans)


def update_masks(layers: Sequence[Layer], changes: Sequence[Tensor]) -> list[bool]:
    """Update masks to the largest scores in place, and rewrite the masked weights where masks change.

    The host synchronizes with the device once. Ties are broken as in `topk.keep_top`. A layer in which some
    scores equal to the threshold must be pruned is skipped; the caller has to update it.

    Parameters
    ----------
    layers
        Layers on one device, with weights of one dtype.
    changes
        A boolean tensor of each layer's size; overwritten with the changed elements.

    Returns
    -------
    list of bool
        For each layer, whether it was updated.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; all masks are then unchanged.
    """
    with torch.cuda.device_of(layers[0].score):
        found = _smallest_kept(layers)
        surplus, nans = torch.stack([found.surplus, found.nans]).tolist()
        if any(nans):
            raise SearchDivergedError("a score is NaN")
        scores, _, masks, weights, values = zip(*layers, strict=True)
        places = _Layers.of(scores, masks, changes, weights, values)
        kind = _TYPES[weights[0].dtype]
        _keep_from[(places.programs,)](
            *places.places,
            _layouts(weights),
            found.smallest,
            found.surplus,
            len(layers),
            kind,
            num_warps=8,
        )
    return [not more for more in surplus]


def weigh(layers: Sequence[Layer], temperature: float) -> None:
    """Write the weights times their soft masks (`soft_mask`) to the values; hard masks are not read.

    The threshold is exact, and the standard deviation is estimated from a sample. There is no
    synchronization.
    """
    with torch.cuda.device_of(layers[0].score):
        found = _smallest_kept(layers)
        scores, keeps, _, weights, values = zip(*layers, strict=True)
        slopes = 1 / (temperature * _deviations(scores)).clamp_min(EQUAL)
        places = _Layers.of(scores, weights, values)
        _weigh[(places.programs,)](
            *places.places,
            _layouts(weights),
            found.smallest,
            slopes,
            _numbers(keeps, scores[0].device),
            len(layers),
            _TYPES[weights[0].dtype],
            num_warps=8,
        )


def _deviations(scores: Sequence[Tensor]) -> Tensor:
    """Return the standard deviation of every layer's scores, (layers,), from a sample as in `soft_mask`."""
    device = scores[0].device
    strides = [stride_of_sample(score.numel()) for score in scores]
    sizes = [-(-score.numel() // stride) for score, stride in zip(scores, strides, strict=True)]
    n, width = _numbers(tuple(sizes), device), max(sizes)
    samples = torch.empty((len(scores), width), device=device)
    grid = (len(scores), -(-width // 1024))
    places = _Layers.of(scores)
    _take_samples[grid](places.addresses, _numbers(tuple(strides), device), n, samples, width)
    means = samples.sum(1) / n
    outside = torch.arange(width, device=device) >= n[:, None]
    squares = (samples - means[:, None]).masked_fill_(outside, 0).square_().sum(1)
    return (squares / (n - 1)).sqrt_()
