"""Top-k selection with exactly k members and deterministic ties (Eq. 5 and Eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.short_rows import LONGEST, keep_in_short_rows

# Scores compared per chunk; a chunk stays in the CPU cache between comparisons.
_CHUNK = 1 << 18
# Up to this number of scores a guess of the threshold saves no time.
_FEW = 1 << 15


def keep_top(scores: Tensor, keep: int, previous: Tensor | None = None) -> Tensor:
    """Select the ``keep`` largest scores.

    Ties are frequent: scores start with two values, and weight decay keeps equal scores equal. Among scores
    equal to the threshold, members of ``previous`` come first, then lower indices (row-major). A mask
    therefore changes only if scores change, and equal scores give equal masks.

    Parameters
    ----------
    scores
        Any shape, any real dtype.
    keep
        Number of scores to keep, from 0 to ``scores.numel()``.
    previous
        Boolean, of the shape of ``scores``: the previously kept set; None for the empty set.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``scores``, with exactly ``keep`` true elements.

    Raises
    ------
    SearchDivergedError
        If a score is NaN, as scores are then unordered.
    """
    scores = scores.detach()
    if previous is not None:
        kept = previous.clone(memory_format=torch.contiguous_format)
    else:  # the certain members; ties are not among them, so that no tie is preferred
        low = _bracket_of_sample(scores.reshape(-1), keep, 3.0)[1] if 0 < keep < scores.numel() else math.inf
        kept = (scores > low).contiguous()
    update_top(scores, keep, kept)
    return kept


@dataclass
class Threshold:
    """Prediction of the smallest kept score of a repeatedly updated set, which mostly moves steadily."""

    value: float = math.nan
    drift: float = math.nan
    reach: float = math.nan
    # Whether many scores are (nearly) equal to the threshold, as initially and without gradients.
    is_crowded: bool = False
    # At the last check, a number above all scores outside the set and below all scores inside.
    between: float = math.nan

    def bracket(self) -> tuple[float, float] | None:
        """Predict the interval of the next threshold; None before the second update."""
        expected = self.value + self.drift
        return None if math.isnan(self.reach) else (expected - self.reach, expected + self.reach)

    def learn(self, value: float) -> None:
        """Record the current threshold."""
        reach = 2 * abs(value - self.value - self.drift)
        self.reach = reach if math.isnan(self.reach) else max(reach, 0.7 * self.reach)
        self.drift = value - self.value
        self.value = value


def update_top(
    scores: Tensor, keep: int, kept: Tensor, n_kept: int | None = None, threshold: Threshold | None = None
) -> Tensor:
    """Update a kept set to the ``keep`` largest scores, in place; ties are broken as in `keep_top`.

    If the set changes little, this costs two comparisons per score and no memory of the scores' size. An
    interval that contains the threshold comes from the last update or from a sample; only members below its
    upper end and others above its lower end are undecided, and the selection runs on these alone.

    Parameters
    ----------
    scores
        Any shape, any real dtype.
    keep
        Number of scores to keep, from 0 to ``scores.numel()``.
    kept
        Contiguous boolean tensor of the shape of ``scores``: the previously kept set; updated.
    n_kept
        Number of previously kept scores, if known.
    threshold
        Prediction from the earlier updates of this set; updated. It affects the speed, not the result.

    Returns
    -------
    Tensor
        Flat indices of the changed elements, int64, unordered.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; ``kept`` is then unchanged.
    """
    flat, members = scores.detach().reshape(-1), kept.view(-1)
    _check_keep(keep, flat.numel())
    if keep in (0, flat.numel()):
        check_order(flat)
        flipped = (members != (keep > 0)).nonzero()[:, 0]
        if len(flipped):  # a write without a change would increment the tensor's version
            members.fill_(keep > 0)
        return flipped
    if n_kept is None:
        n_kept = int(members.count_nonzero())
    if (
        threshold is not None
        and threshold.is_crowded
        and n_kept == keep
        and _stands(flat, members, threshold)
    ):
        return torch.empty(0, dtype=torch.int64)
    for low, high in _brackets(flat, keep, threshold):
        places = _places_in_doubt(flat, members, low, high)
        values, before = flat[places], members[places]
        if len(values) and math.isnan(values.max()):
            raise SearchDivergedError("a score is NaN")
        wanted = keep - n_kept + int(before.count_nonzero())
        if 0 < wanted <= len(values):
            smallest = values.kthvalue(len(values) - wanted + 1).values.item()
            if low <= smallest <= high:  # then all decided elements are correct
                break
    if threshold is not None:
        threshold.learn(smallest)
        threshold.is_crowded = len(flat) > _FEW and 16 * len(places) > len(flat)
    after = values >= smallest
    if int(after.count_nonzero()) > wanted:
        ties = values == smallest
        queue = torch.cat([(ties & before).nonzero()[:, 0], (ties & ~before).nonzero()[:, 0]])
        after[queue[wanted - int(after.count_nonzero()) :]] = False  # the surplus, from the end of the queue
    flipped = places[after != before]
    if len(flipped):
        members[flipped] = members[flipped].logical_not_()
    return flipped


def _brackets(flat: Tensor, keep: int, threshold: Threshold | None) -> Iterator[tuple[float, float]]:
    """Iterate over intervals that contain the threshold with increasing confidence; the last one is exact."""
    if len(flat) <= _FEW:
        yield -math.inf, math.inf
    if threshold is not None and (bracket := threshold.bracket()) is not None:
        yield bracket
    yield _bracket_of_sample(flat, keep, 3.0)
    yield _bracket_of_sample(flat, keep, 12.0)
    smallest = flat.kthvalue(flat.numel() - keep + 1).values.item()
    yield smallest, smallest


def update_tops(sets: Sequence[tuple[Tensor, int, Tensor]]) -> list[Tensor]:
    """Update many kept sets to the largest scores of every row, in place, on an accelerator.

    The host synchronizes with the device once for all sets. Ties are broken within a row, as in `keep_top`.

    Parameters
    ----------
    sets
        ``(scores, keep, kept)`` per set: scores of shape (rows, n), the number to keep per row, and the
        previously kept set, boolean, of the shape of ``scores``.

    Returns
    -------
    list of Tensor
        For each set a boolean tensor of its shape, true for changed elements.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; all sets are then unchanged.
    """
    found, counts = [], []
    for scores, keep, _ in sets:
        scores = scores.detach()
        smallest = _smallest_kept(scores, keep)
        above, ties = scores > smallest, scores == smallest
        n_above = above.sum(1, keepdim=True)
        found.append((above, ties, n_above))
        counts += [n_above.sum() + ties.sum(), scores.amax().isnan()]
    on_host = torch.stack(counts).tolist() if counts else []
    if any(on_host[1::2]):
        raise SearchDivergedError("a score is NaN")
    changed = []
    for (_, keep, kept), (above, ties, n_above), n_candidates in zip(sets, found, on_host[::2], strict=True):
        if n_candidates > keep * len(kept):
            ties = _first_ties(ties, ties & kept, keep - n_above)
        after = above.logical_or_(ties)
        changed.append(after != kept)
        kept.copy_(after)
    return changed


def _smallest_kept(scores: Tensor, keep: int) -> Tensor:
    """Return the ``keep``-th largest score of every row, of shape (rows, 1), without synchronization."""
    n = scores.shape[1]
    _check_keep(keep, n)
    if keep == 0:  # an empty set has no smallest member
        highest = math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
        return scores.new_full((len(scores), 1), highest)
    if 2 * keep <= n:
        return scores.topk(keep, sorted=False).values.amin(1, keepdim=True)
    return scores.topk(n - keep + 1, largest=False, sorted=False).values.amax(1, keepdim=True)


def _stands(flat: Tensor, members: Tensor, threshold: Threshold) -> bool:
    """Return True if a set already has the largest scores; ties do not matter, NaN returns False."""
    if not math.isnan(threshold.between) and _has_numpy(flat) and _is_split(flat, members, threshold.between):
        return True
    threshold.between = math.nan
    lowest, highest = math.inf, -math.inf
    worst = torch.tensor([math.inf, -math.inf]).to(flat.dtype)
    for start in range(0, len(flat), _CHUNK):
        part, kept = flat[start : start + _CHUNK], members[start : start + _CHUNK]
        low = torch.where(kept, part, worst[0]).min().item()
        high = torch.where(kept, worst[1], part).max().item()
        if math.isnan(low) or math.isnan(high):
            return False
        lowest, highest = min(lowest, low), max(highest, high)
    if highest < lowest:
        threshold.between = (highest + lowest) / 2
    return highest <= lowest


def _is_split(flat: Tensor, members: Tensor, between: float) -> bool:
    """Return True if the members of a set are exactly the scores above a number, and no score is NaN."""
    scores, kept = flat.numpy(), members.numpy()
    above = np.empty(min(_CHUNK, len(flat)), dtype=np.bool_)
    for start in range(0, len(flat), _CHUNK):
        part, is_kept = scores[start : start + _CHUNK], kept[start : start + _CHUNK]
        a = above[: len(part)]
        np.not_equal(np.greater(part, between, out=a), is_kept, out=a)
        if a.any() or math.isnan(part.max()):
            return False
    return True


def _has_numpy(flat: Tensor) -> bool:
    """Return True if NumPy can compare the scores; it takes a quarter of PyTorch's time, being vectorized."""
    return flat.is_cpu and flat.dtype in (torch.float32, torch.float64)


def _places_in_doubt(flat: Tensor, members: Tensor, low: float, high: float) -> Tensor:
    """Return the ascending indices of members not above ``high``, and of others not below ``low``.

    NaN compares as neither, and is therefore included.
    """
    if low == -math.inf and high == math.inf:
        return torch.arange(len(flat), device=flat.device)
    if not _has_numpy(flat):
        return (((flat > high) != members) | ((flat < low) == members)).nonzero()[:, 0]
    scores, kept = flat.numpy(), members.numpy()
    above, doubt = np.empty((2, min(_CHUNK, len(flat))), dtype=np.bool_)
    found = []
    for start in range(0, len(flat), _CHUNK):
        part, was_kept = scores[start : start + _CHUNK], kept[start : start + _CHUNK]
        a, d = above[: len(part)], doubt[: len(part)]
        np.not_equal(np.greater(part, high, out=a), was_kept, out=a)
        np.equal(np.less(part, low, out=d), was_kept, out=d)
        found.append(np.flatnonzero(np.logical_or(a, d, out=d)) + start)
    return torch.from_numpy(np.concatenate(found))


def _bracket_of_sample(flat: Tensor, keep: int, deviations: float) -> tuple[float, float]:
    """Return an interval that contains the threshold with ``deviations``-sigma confidence, from a sample."""
    stride = max(1, round(flat.numel() ** (1 / 3))) | 1
    if stride % 3 == 0:  # coprime to 3 and 2, so that no position within 3 x 3 kernels is preferred
        stride += 2
    sample = flat[::stride]
    pruned = len(sample) * (1 - keep / flat.numel())
    margin = 1 + deviations * math.sqrt(pruned * keep / flat.numel())
    low, high = math.floor(pruned - margin), math.ceil(pruned + margin)
    return (
        sample.kthvalue(low).values.item() if low >= 1 else -math.inf,
        sample.kthvalue(high).values.item() if high <= len(sample) else math.inf,
    )


def keep_top_by_row(scores: Tensor, keep: int, previous: Tensor | None = None) -> Tensor:
    """Select the ``keep`` largest scores of every row; ties are broken within the row, as in `keep_top`.

    Parameters
    ----------
    scores
        Shape (rows, n), any real dtype; many short rows (N:M sparsity) or a few long rows.
    keep
        Number of scores to keep per row, from 0 to n.
    previous
        Boolean, of the shape of ``scores``: the previously kept set; None for the empty set.

    Returns
    -------
    Tensor
        Boolean, of shape (rows, n), with exactly ``keep`` true elements in each row.

    Raises
    ------
    SearchDivergedError
        If a score is NaN, as scores are then unordered.
    """
    scores = scores.detach()
    n = scores.shape[1]
    _check_keep(keep, n)
    check_order(scores)
    if keep in (0, n):
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    if n <= LONGEST:
        return keep_in_short_rows(scores, keep, previous)

    threshold = scores.kthvalue(n - keep + 1, dim=1, keepdim=True).values
    kept = scores > threshold
    ties = scores == threshold
    stayers = torch.zeros_like(ties) if previous is None else ties & previous
    return kept | _first_ties(ties, stayers, keep - kept.sum(1, keepdim=True))


def _first_ties(ties: Tensor, stayers: Tensor, room: Tensor) -> Tensor:
    """Return the first ``room`` ties of every row: stayers go before others, and then the lower position."""
    behind = stayers.sum(1, keepdim=True) + (ties & ~stayers).cumsum(1)
    return ties & (torch.where(stayers, stayers.cumsum(1), behind) <= room)


def swap_at_most(kept: Tensor, before: Tensor, scores: Tensor, limit: int) -> Tensor:
    """Limit the change from one mask to the next to ``limit`` swaps.

    This is the short restriction on sparse masks in the paper's journal version. If more than ``limit``
    members would enter, only the ``limit`` highest scores enter and the ``limit`` lowest leave; among equal
    scores the lower index goes first.

    Parameters
    ----------
    kept
        Boolean, any shape: the top-k set.
    before
        Boolean, of the shape of ``kept``: the previously kept set, with the same number of members.
    scores
        Scores, of the shape of ``kept``.
    limit
        Maximal number of entering members, at least 0.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``kept``, with the same number of members. The numbers of members per row are
        not preserved.

    Raises
    ------
    ValueError
        If ``limit`` is negative.
    SearchDivergedError
        If the limit applies, and the score of an entering or leaving member is NaN.
    """
    if limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    entering, leaving = kept & ~before, before & ~kept
    if int(entering.sum()) <= limit:
        return kept
    entering = entering.masked_scatter(entering, keep_top(scores[entering], limit))
    leaving = leaving.masked_scatter(leaving, keep_top(-scores[leaving], limit))
    return (before | entering) & ~leaving


def _check_keep(keep: int, available: int) -> None:
    if not 0 <= keep <= available:
        raise ValueError(f"keep must lie between 0 and the {available} scores, got {keep}")


def check_order(scores: Tensor) -> None:
    """Raise SearchDivergedError if a score is NaN."""
    if scores.numel() and scores.max().isnan():
        raise SearchDivergedError("a score is NaN")
