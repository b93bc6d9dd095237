"""Exact improvement of a mask by swaps, from the Gram matrix of a layer's inputs; no backward pass.

The error of a masked layer on its inputs X (features x tokens) is ``|W X - (W * mask) X|^2``. Rows of W do
not interact, and a row's error is quadratic in its mask, so the change by one swap is known exactly from the
Gram matrix ``G = X X^T``. Swapping while the error falls is the idea of DSnoT (Zhang et al., ICLR 2024) and
SparseSwaps (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns whose groups are visited before all columns are updated.
_COLUMNS = 128
# Share of the weights: where a sweep swaps fewer, the next one would hardly lower the error.
_FEW_SWAPS = 1e-3


@torch.no_grad()
def benefit_of_keeping(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Return by how much each weight lowers its row's error: if kept, and with the rest of the mask.

    Parameters
    ----------
    weight
        Of shape (out, in).
    kept
        The mask, boolean, of shape (out, in).
    gram
        ``X X^T`` of the layer's inputs X, of shape (in, in).

    Returns
    -------
    Tensor
        Of shape (out, in): the error without the weight minus the error with it, exactly.
    """
    weight, gram = _scaled(weight, gram)
    slope = 2 * weight * _correlation(weight, kept, gram)
    curve = weight.square() * gram.diagonal()
    return slope + torch.where(kept, curve, -curve)


@torch.no_grad()
def swap_in_groups(
    weight: Tensor,
    kept: Tensor,
    gram: Tensor,
    groups: Tensor,
    max_sweeps: int = 20,
) -> Tensor:
    """Improve an N:M mask: swap a kept and a pruned weight of a group while that lowers the row's error.

    Groups are visited in turn, all rows at once; in each the best swap is made. The result is a mask that no
    single swap within a group improves, or that of the last sweep.

    Parameters
    ----------
    weight, kept, gram
        As for `benefit_of_keeping`.
    groups
        Indices of columns, of shape (groups, M): the groups, the same in every row.
    max_sweeps
        How often each group is visited at most.

    Returns
    -------
    Tensor
        Boolean, of shape (out, in), with as many kept weights in every group of every row.
    """
    weight, gram = _scaled(weight, gram)
    correlation = _correlation(weight, kept, gram)
    tolerance = _tolerance(weight, gram)
    order = groups.flatten()
    size = groups.shape[1]
    # Columns as rows, in the order of the groups: a group is a slice then.
    w, k, c = (values[:, order].t().contiguous() for values in (weight, kept, correlation))
    gram = gram[order][:, order].contiguous()
    # Groups share an update of all columns, which takes most of the time.
    together = max(1, _COLUMNS // size) * size
    for _ in range(max_sweeps):
        swaps = 0
        for start in range(0, len(order), together):
            part = slice(start, start + together)
            before = k[part].clone()
            swaps += _sweep(w[part], k[part], gram[part, part], c[part].clone(), size, tolerance)
            removed = w[part] * (before.to(w.dtype) - k[part].to(w.dtype))
            c.addmm_(gram[:, part], removed)
        if swaps <= _FEW_SWAPS * weight.numel():
            break
    improved = torch.empty_like(kept)
    improved[:, order] = k.t()
    return improved


def _sweep(
    weight: Tensor, kept: Tensor, gram: Tensor, correlation: Tensor, size: int, tolerance: Tensor
) -> int:
    """Make the best swap of each of some groups, in turn; return how many were made.

    All tensors are of these groups' columns alone, which are the rows here. Change ``kept`` in place, and
    overwrite ``correlation``.
    """
    swaps = torch.zeros((), dtype=torch.long, device=kept.device)
    for start in range(0, len(weight), size):
        group = slice(start, start + size)
        w, k, products = weight[group], kept[group], gram[group, group]
        slope = 2 * w * correlation[group]
        curve = w.square() * products.diagonal()[:, None]
        # In a group without a pruned or without a kept weight, no pair has a finite change.
        add = (curve - slope).masked_fill_(k, torch.inf)
        drop = curve.add_(slope).masked_fill_(~k, torch.inf)
        both = (w[:, None] * w[None]).mul_(2 * products[:, :, None])
        best, pair = (add[:, None] + drop[None]).sub_(both).flatten(0, 1).min(0)
        accepted = (best < -tolerance)[None]
        swapped = torch.zeros_like(k)
        swapped.scatter_(0, (pair // size)[None], accepted)
        swapped.scatter_(0, (pair % size)[None], accepted)
        removed = torch.where(k, w, -w).mul_(swapped)
        k.logical_xor_(swapped)
        correlation.addmm_(gram[:, group], removed)
        swaps += accepted.count_nonzero()
    return int(swaps)


@torch.no_grad()
def swap_in_rows(weight: Tensor, kept: Tensor, gram: Tensor, max_swaps: int | None = None) -> Tensor:
    """Improve a mask by swaps within rows of the weight, while that lowers the row's error.

    In every step each row swaps the pruned weight whose return lowers the error most with the kept weight
    whose removal then raises the error least, or chooses the kept weight first, whichever is better.

    Parameters
    ----------
    weight, kept, gram
        As for `benefit_of_keeping`.
    max_swaps
        Most swaps of a row; a quarter of its length if None.

    Returns
    -------
    Tensor
        Boolean, of shape (out, in), with as many kept weights in every row.
    """
    kept = kept.clone()
    weight, gram = _scaled(weight, gram)
    squares = weight.square() * gram.diagonal()
    correlation = _correlation(weight, kept, gram)
    tolerance = _tolerance(weight, gram)
    active = (kept.any(1) & ~kept.all(1)).nonzero()[:, 0]
    for _ in range(weight.shape[1] // 4 if max_swaps is None else max_swaps):
        if not len(active):
            break
        w, k, c, square = weight[active], kept[active], correlation[active], squares[active]
        add = (square - 2 * w * c).masked_fill_(k, torch.inf)
        drop = (square + 2 * w * c).masked_fill_(~k, torch.inf)
        best = None
        for first, second in ((add, drop), (drop, add)):
            first_change, i = first.min(1, keepdim=True)
            both = second - 2 * w.gather(1, i) * w * gram[i[:, 0]]
            second_change, j = both.min(1, keepdim=True)
            change = (first_change + second_change)[:, 0]
            found = (change, i, j)
            best = found if best is None else _better(best, found)
        assert best is not None
        change, i, j = best
        accepted = change < -tolerance[active]
        rows, i, j, w = active[accepted], i[accepted], j[accepted], w[accepted]
        for column in (i, j):
            was = kept[rows, column[:, 0]]
            step = w.gather(1, column) * torch.where(was, 1.0, -1.0)[:, None]
            correlation[rows] += step * gram[column[:, 0]]
            kept[rows, column[:, 0]] = ~was
        active = rows
    return kept


def _better(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    first = a[0] <= b[0]
    return (
        torch.where(first, a[0], b[0]),
        torch.where(first[:, None], a[1], b[1]),
        torch.where(first[:, None], a[2], b[2]),
    )


def _scaled(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype), gram.to(dtype)


def _correlation(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Return the correlation of every input with the residual of every row, of shape (out, in)."""
    return (weight * ~kept) @ gram


def _tolerance(weight: Tensor, gram: Tensor) -> Tensor:
    """Return what a change must exceed, row by row, to be more than rounding."""
    scale = (weight.square() * gram.diagonal()).sum(1)
    return scale * torch.finfo(weight.dtype).eps * 4
