"""From scores to the kept set: exactly k members, ties decided (Eq. 5 and Eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.short_rows import LONGEST, keep_in_short_rows

# Scores looked at in one go: few enough to stay in the cache from one comparison to the next.
_CHUNK = 1 << 18
_FEW = 1 << 15


def keep_top(scores: Tensor, keep: int, previous: Tensor | None = None) -> Tensor:
    """Select the ``keep`` largest scores.

    Scores begin as two values and weight decay keeps equal scores equal, so ties are the rule, not the
    exception. Among scores equal to the smallest kept one, members of ``previous`` come first, then the lower
    index (row-major): a mask changes only where a score says so, and the same scores give the same mask.

    Parameters
    ----------
    scores
        Any shape, any real dtype.
    keep
        How many to keep, from 0 to ``scores.numel()``.
    previous
        Boolean tensor of the shape of ``scores``: the set kept before. None counts as empty.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``scores``, with exactly ``keep`` true elements.

    Raises
    ------
    SearchDivergedError
        If a score is NaN: there is no order then.
    """
    scores = scores.detach()
    if previous is not None:
        kept = previous.clone(memory_format=torch.contiguous_format)
    else:  # what is kept for sure: no tie is, and so none is preferred
        low = _bracket_of_sample(scores.reshape(-1), keep, 3.0)[1] if 0 < keep < scores.numel() else math.inf
        kept = (scores > low).contiguous()
    update_top(scores, keep, kept)
    return kept


@dataclass
class Threshold:
    """The smallest kept score of a set that is updated over and over, and how it moves: steadily, mostly."""

    value: float = math.nan
    drift: float = math.nan
    reach: float = math.nan
    # Whether many scores are equal to it, or nearly, as at first and where no gradient flows.
    is_crowded: bool = False
    # Above all scores outside of the set, and below all inside, when these were last looked at.
    between: float = math.nan

    def bracket(self) -> tuple[float, float] | None:
        """Return scores between which it should lie next; None until it has been seen to move."""
        expected = self.value + self.drift
        return None if math.isnan(self.reach) else (expected - self.reach, expected + self.reach)

    def learn(self, value: float) -> None:
        """Take note of where it lies now."""
        reach = 2 * abs(value - self.value - self.drift)
        self.reach = reach if math.isnan(self.reach) else max(reach, 0.7 * self.reach)
        self.drift = value - self.value
        self.value = value


def update_top(
    scores: Tensor, keep: int, kept: Tensor, n_kept: int | None = None, threshold: Threshold | None = None
) -> Tensor:
    """Turn the set kept before into that of the ``keep`` largest scores, in place; ties as in `keep_top`.

    The cost is that of two comparisons a score and no memory of the size of the scores, as long as sets
    differ little: few places are in doubt where it is known between which scores the smallest kept one lies,
    and all is decided among these. That is known from the last update, or else from a sample.

    Parameters
    ----------
    scores
        Any shape, any real dtype.
    keep
        How many to keep, from 0 to ``scores.numel()``.
    kept
        Contiguous boolean tensor of the shape of ``scores``.
    n_kept
        How many are kept before, if that is known.
    threshold
        What the last update of this set has found out; updated. The result does not depend on it.

    Returns
    -------
    Tensor
        Indices of the flat places that have changed, int64, in no order.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; ``kept`` is then as it was.
    """
    flat, members = scores.detach().reshape(-1), kept.view(-1)
    _check_keep(keep, flat.numel())
    if keep in (0, flat.numel()):
        check_order(flat)
        flipped = (members != (keep > 0)).nonzero()[:, 0]
        if len(flipped):  # or else the set is not written to, and stays of the same version
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
            if low <= smallest <= high:  # so that what is not in doubt is as it should be
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
    """Iterate over ever surer guesses between which scores the smallest kept one lies; the last is right."""
    if len(flat) <= _FEW:  # no guess is worth its while
        yield -math.inf, math.inf
    if threshold is not None and (bracket := threshold.bracket()) is not None:
        yield bracket
    yield _bracket_of_sample(flat, keep, 3.0)
    yield _bracket_of_sample(flat, keep, 12.0)
    smallest = flat.kthvalue(flat.numel() - keep + 1).values.item()
    yield smallest, smallest


def update_tops(sets: Sequence[tuple[Tensor, int, Tensor]]) -> list[Tensor]:
    """Turn many sets into those of the largest scores of every row, in place; for an accelerator.

    The host waits for the device once, however many sets there are. Ties are decided as in `keep_top`, within
    a row.

    Parameters
    ----------
    sets
        Each of ``(scores, keep, kept)``: scores of shape (rows, n), how many every row keeps, and the boolean
        set kept before, of the shape of ``scores``.

    Returns
    -------
    list of Tensor
        For each set a boolean tensor of its shape, true at the places that have changed.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; all sets are then as they were.
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
            stayers, others = ties & kept, ties & ~kept
            behind = stayers.sum(1, keepdim=True) + others.cumsum(1)
            ties = ties & (torch.where(stayers, stayers.cumsum(1), behind) <= keep - n_above)
        after = above.logical_or_(ties)
        changed.append(after != kept)
        kept.copy_(after)
    return changed


def _smallest_kept(scores: Tensor, keep: int) -> Tensor:
    """Return the ``keep``-th largest score of every row, of shape (rows, 1); nobody waits for it."""
    n = scores.shape[1]
    _check_keep(keep, n)
    if keep == 0:  # an empty set has no smallest member
        highest = math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max
        return scores.new_full((len(scores), 1), highest)
    if 2 * keep <= n:
        return scores.topk(keep, sorted=False).values.amin(1, keepdim=True)
    return scores.topk(n - keep + 1, largest=False, sorted=False).values.amax(1, keepdim=True)


def _stands(flat: Tensor, members: Tensor, threshold: Threshold) -> bool:
    """Tell whether no score outside of a set exceeds one inside; ties leave it as it is, NaN never does."""
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
    """Tell whether the members of a set are the scores above a number, and there is no NaN."""
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
    """Return whether NumPy compares the scores: in a quarter of PyTorch's time, since it is vectorized."""
    return flat.is_cpu and flat.dtype in (torch.float32, torch.float64)


def _places_in_doubt(flat: Tensor, members: Tensor, low: float, high: float) -> Tensor:
    """Return the indices of members not above the bracket, and of others not below it; ascending.

    A NaN is neither above nor below, and so in doubt.
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
    """Return scores between which the smallest kept one lies, but for bad luck of so many deviations."""
    stride = max(1, round(flat.numel() ** (1 / 3))) | 1
    if stride % 3 == 0:  # out of step with kernels of 3 x 3 weights, as with powers of two
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
    """Select the ``keep`` largest scores of every row, ties decided within the row as by `keep_top`.

    Parameters
    ----------
    scores
        Of shape (rows, n), any real dtype; many short rows (N:M sparsity) or a few long ones.
    keep
        How many to keep in each row, from 0 to n.
    previous
        Boolean tensor of the shape of ``scores``: the set kept before. None counts as empty.

    Returns
    -------
    Tensor
        Boolean, of shape (rows, n), with exactly ``keep`` true elements in each row.

    Raises
    ------
    SearchDivergedError
        If a score is NaN: there is no order then.
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
    stayers = ties & previous if previous is not None else torch.zeros_like(ties)
    others = ties & ~stayers
    # Every tie's place in the row's queue, from 1: stayers by index, then the others by index.
    behind = stayers.sum(1, keepdim=True) + others.cumsum(1)
    place = torch.where(stayers, stayers.cumsum(1), behind)
    return kept | (ties & (place <= keep - kept.sum(1, keepdim=True)))


def swap_at_most(kept: Tensor, before: Tensor, scores: Tensor, limit: int) -> Tensor:
    """Go from one mask towards another, by ``limit`` swaps at most.

    This is the short restriction on sparse masks of the paper's journal version. If more than ``limit``
    members would enter, only those of highest score enter, and as many leave, those of lowest score; of equal
    scores the lower index goes first.

    Parameters
    ----------
    kept
        Boolean, any shape: the set that the scores ask for.
    before
        Boolean, of the shape of ``kept``, with as many members: the set kept before.
    scores
        Of the shape of ``kept``.
    limit
        How many may enter, at least 0.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``kept``, with as many members. Counts of single rows are not preserved.

    Raises
    ------
    ValueError
        If ``limit`` is negative.
    SearchDivergedError
        If the score of a member that would enter or leave is NaN, and not all of them can.
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
        raise ValueError(f"keep must lie between 0 and the {available} scores there are, got {keep}")


def check_order(scores: Tensor) -> None:
    """Raise SearchDivergedError if a score is NaN, for which there is no order."""
    if scores.numel() and scores.max().isnan():
        raise SearchDivergedError("a score is NaN")
