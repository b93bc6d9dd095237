"""From scores to the kept set: exactly k members, ties decided (Eq. 5 and Eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError


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
    flat = scores.detach().reshape(-1)
    if not 0 <= keep <= flat.numel():
        raise ValueError(f"keep must lie between 0 and the {flat.numel()} scores there are, got {keep}")
    if flat.numel() and flat.max().isnan():
        raise SearchDivergedError("a score is NaN")
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)

    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    kept = flat > threshold
    ties = flat == threshold
    open_places = keep - int(kept.sum())
    if open_places < int(ties.sum()):
        stayers = ties & previous.reshape(-1) if previous is not None else torch.zeros_like(ties)
        n_stayers = int(stayers.sum())
        if n_stayers >= open_places:
            ties = _first(stayers, open_places)
        else:
            ties = stayers | _first(ties & ~stayers, open_places - n_stayers)
    return (kept | ties).reshape(scores.shape)


def _first(members: Tensor, count: int) -> Tensor:
    """Return the ``count`` members of lowest index of a flat boolean tensor."""
    chosen = torch.zeros_like(members)
    chosen[members.nonzero()[:count, 0]] = True
    return chosen
