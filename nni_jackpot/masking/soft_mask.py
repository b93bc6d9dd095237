"""Soft masks: a sigmoid of each score's distance from the top-k threshold."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.topk import has_numpy

# Sample size from which the threshold and the standard deviation of more scores are estimated.
_SAMPLE = 1 << 14
# Weights that are masked in one go: on a CPU a block stays in the cache between operations.
_BLOCK = 1 << 17
# Lower bound of temperature times standard deviation, for scores that are all equal.
EQUAL = 1e-12


def stride_of_sample(count: int) -> int:
    """Return the stride of the sample from which ``count`` scores are estimated."""
    return max(1, count // _SAMPLE)


@torch.no_grad()
def soft_mask(
    score: Tensor, mask: Tensor, keep: int, grains: Grains, temperature: float, out: Tensor | None = None
) -> Tensor:
    """Return the soft mask ``sigmoid((score - threshold) / (temperature * deviation))``.

    The threshold is the smallest kept score of each row, and the deviation is the standard deviation of all
    scores. For a single row both are estimated from a sample with a constant stride.

    Parameters
    ----------
    score
        Scores, in the grains' score shape.
    mask
        The hard mask of these scores, boolean, in the target's shape.
    keep
        Number of kept grains.
    grains
        The grains of the target.
    temperature
        Positive, in standard deviations of the scores. A lower temperature is closer to the hard mask.
    out
        Optional tensor for the result, of the score's shape and dtype.

    Returns
    -------
    Tensor
        The soft mask, of the score's shape and dtype; all ones if all grains are kept.
    """
    if keep == grains.count:
        return torch.ones_like(score) if out is None else out.fill_(1)
    threshold, slope = _sigmoid_of(score, mask, keep, grains, temperature)
    return torch.sub(score, threshold, out=out).mul_(slope).sigmoid_()


@torch.no_grad()
def mask_softly(
    weight: Tensor, score: Tensor, mask: Tensor, keep: int, grains: Grains, temperature: float, out: Tensor
) -> None:
    """Write the weights times their soft mask; arguments as for `soft_mask`, all of one shape and dtype."""
    tensors = score, weight, out
    are_flat = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
    if keep == grains.count or grains.rows > 1 or not are_flat:
        soft_mask(score, mask, keep, grains, temperature, out=out).mul_(weight)
        return
    threshold, slope = _sigmoid_of(score, mask, keep, grains, temperature)
    for block in zip(*(tensor.view(-1).split(_BLOCK) for tensor in tensors), strict=True):
        scores, weights, values = block
        torch.sub(scores, threshold, out=values).mul_(slope).sigmoid_().mul_(weights)


def _sigmoid_of(
    score: Tensor, mask: Tensor, keep: int, grains: Grains, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return threshold and slope of the sigmoid; the threshold is a scalar, or of the score's shape."""
    if grains.rows == 1:
        sample = score.detach().flatten()[:: stride_of_sample(grains.count)]
        return sigmoid_of_sample(sample, keep / grains.count, temperature)
    by_row = grains.by_row(score.masked_fill(~grains.of_mask(mask), torch.inf))
    threshold = grains.of_rows(by_row.amin(1, keepdim=True).expand_as(by_row))
    return threshold, _slope(score, temperature)


def sigmoid_of_sample(sample: Tensor, density: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Estimate threshold and slope of a sigmoid from a sample of scores, of which a share is kept."""
    ascending = _sorted(sample)
    place = round(len(ascending) * (1 - density))
    return ascending[min(place, len(ascending) - 1)], _slope(ascending, temperature)


def _slope(scores: Tensor, temperature: float) -> Tensor:
    return 1 / (temperature * scores.std()).clamp_min(EQUAL)


def _sorted(sample: Tensor) -> Tensor:
    """Sort scores in ascending order; on a CPU by NumPy, whose sort takes a tenth of PyTorch's time."""
    if has_numpy(sample):
        return torch.from_numpy(np.sort(sample.numpy()))
    return sample.sort().values
