"""From scores to the kept set: exactly k members, ties decided (Eq. 5 and Eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError


def keep_top(scores: Tensor, keep: int, previous: Tensor | None = None, then: Tensor | None = None) -> Tensor:
    """Select the ``keep`` largest scores.

    Scores begin as two values and weight decay keeps equal scores equal, so ties are the rule, not the
    exception. Among scores equal to the smallest kept one, larger values of ``then`` come first, then members
    of ``previous``, then the lower index (row-major): a mask changes only where a score says so, and the same
    scores give the same mask.

    Parameters
    ----------
    scores
        Any shape, any real dtype.
    keep
        How many to keep, from 0 to ``scores.numel()``.
    previous
        Boolean tensor of the shape of ``scores``: the set kept before. None counts as empty.
    then
        Tensor of the shape of ``scores`` that decides between equal scores, such as the initial importance.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``scores``, with exactly ``keep`` true elements.

    Raises
    ------
    SearchDivergedError
        If a score is NaN, or a value of ``then`` that would have to decide: there is no order then.
    """
    flat = scores.detach().reshape(-1)
    _check_order(flat, keep, flat.numel())
    if keep in (0, flat.numel()):
        return torch.full_like(scores, keep > 0, dtype=torch.bool)

    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    kept = flat > threshold
    ties = flat == threshold
    open_places = keep - int(kept.sum())
    if open_places < int(ties.sum()):
        before = previous.reshape(-1) if previous is not None else torch.zeros_like(ties)
        if then is not None:
            ties = ties.masked_scatter(ties, keep_top(then.reshape(-1)[ties], open_places, before[ties]))
        else:
            stayers = ties & before
            n_stayers = int(stayers.sum())
            if n_stayers >= open_places:
                ties = _first(stayers, open_places)
            else:
                ties = stayers | _first(ties & ~stayers, open_places - n_stayers)
    return (kept | ties).reshape(scores.shape)


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
    _check_order(scores, keep, n)
    if keep in (0, n):
        return torch.full_like(scores, keep > 0, dtype=torch.bool)

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


def _check_order(scores: Tensor, keep: int, available: int) -> None:
    if not 0 <= keep <= available:
        raise ValueError(f"keep must lie between 0 and the {available} scores there are, got {keep}")
    if scores.numel() and scores.max().isnan():
        raise SearchDivergedError("a score is NaN")


def _first(members: Tensor, count: int) -> Tensor:
    """Return the ``count`` members of lowest index of a flat boolean tensor."""
    chosen = torch.zeros_like(members)
    chosen[members.nonzero()[:count, 0]] = True
    return chosen
