"""Masks not decided yet: numbers between 0 and 1, by how far scores lie from the smallest kept one."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.masking.granularity import Grains

# Scores that the smallest kept one, and their deviation, are estimated from where there are many.
_SAMPLE = 1 << 14
# What is taken for a deviation of zero.
EQUAL = 1e-12


def stride_of_sample(count: int) -> int:
    """Return how many scores there are to one of the sample that stands for all of them."""
    return max(1, count // _SAMPLE)


@torch.no_grad()
def soft_mask(
    score: Tensor, mask: Tensor, keep: int, grains: Grains, temperature: float, out: Tensor | None = None
) -> Tensor:
    """Return what takes the place of a mask: ``sigmoid((score - threshold) / (temperature * deviation))``.

    The threshold is the smallest score that is kept, of each row its own, and the deviation that of all
    scores. In one long row both are those of a sample, of every so many-th score.

    Parameters
    ----------
    score
        Of the grains' score shape.
    mask
        That goes with it, boolean, of the target's shape.
    keep
        How many grains it keeps.
    grains
        What a score stands for.
    temperature
        In standard deviations of the scores, positive. The lower, the nearer to the mask.
    out
        Of the score shape and dtype, for the result.

    Returns
    -------
    Tensor
        Of the score shape and dtype. Where all grains are kept there is nothing to decide: all ones.
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
