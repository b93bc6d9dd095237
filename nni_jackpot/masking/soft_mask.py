"""Soft masks: a sigmoid of each score's distance from the top-k threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.masking.granularity import Grains

# Sample size from which the threshold and the standard deviation of more scores are estimated.
_SAMPLE = 1 << 14
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
    if grains.rows == 1:
        sample = score.flatten()[:: stride_of_sample(grains.count)].sort().values
        place = round(len(sample) * (1 - keep / grains.count))
        threshold = sample[min(place, len(sample) - 1)]
    else:
        sample = score
        by_row = grains.by_row(score.masked_fill(~grains.of_mask(mask), torch.inf))
        threshold = grains.of_rows(by_row.amin(1, keepdim=True).expand_as(by_row))
    slope = 1 / (temperature * sample.std()).clamp_min(EQUAL)
    return torch.sub(score, threshold, out=out).mul_(slope).sigmoid_()
