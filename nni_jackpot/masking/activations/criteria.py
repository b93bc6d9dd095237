"""Criteria that see activations: importance of weights from the inputs of their layer.

All functions take matrices of one row for each output feature, with any leading dimensions; see
`nni_jackpot.masking.activations.input_statistics.to_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError

# Share of the mean of a Gram matrix's diagonal that is added to the diagonal (SparseGPT, Sec. 3.5).
DAMPING = 0.01
# Columns whose mask is chosen at once, and after which the update reaches the columns that follow.
_BLOCK = 128


def wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """Return the importance ``|w| * |x|``: magnitude times the norm of the weight's input feature.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (ICLR 2024), Eq. 1.
    Compare importances within a row: norms of inputs say nothing about which output matters.

    Parameters
    ----------
    weight
        Of shape (..., out, in).
    squares
        Sum of squares of every input feature, of shape (..., in).
    """
    return weight.detach().abs() * squares.sqrt().unsqueeze(-2)


def sparsegpt(weight: Tensor, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the importance ``w^2 / [H^-1]_jj``: the error of removing a weight if all others adapt.

    Frantar and Alistarh, "SparseGPT" (ICML 2023), Eq. 3, with ``H`` the damped Gram matrix. The masks alone
    are used here: the weights do not adapt. `sparsegpt_update` is the method with its update.

    Parameters
    ----------
    weight
        Of shape (..., out, in).
    gram
        Sum of outer products of the inputs, of shape (..., in, in).
    damping
        Share of the mean of the diagonal that is added to the diagonal.

    Raises
    ------
    SearchDivergedError
        If the damped Gram matrix is not positive definite, which only inputs that are not finite cause.
    """
    inverse = torch.cholesky_inverse(_cholesky(_damped(gram, damping)))
    return weight.detach().square() / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)


@torch.no_grad()
def sparsegpt_update(
    weight: Tensor,
    gram: Tensor,
    density: float = 0.5,
    pattern: tuple[int, int] | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Prune a weight column by column, and let the columns that follow make up for the error.

    Algorithm 1 of "SparseGPT" (Frantar and Alistarh, ICML 2023). It changes weights: a comparator for
    searches, which do not.

    Parameters
    ----------
    weight
        Of shape (out, in).
    gram
        Sum of outer products of the inputs, of shape (in, in).
    density
        Share of the weights to keep, in [0, 1], over every block of 128 columns; ignored with ``pattern``.
    pattern
        N and M of an N:M pattern along the rows; M must divide ``in``.
    damping
        Share of the mean of the diagonal that is added to the diagonal.

    Returns
    -------
    kept : Tensor
        The mask, boolean, of shape (out, in).
    updated : Tensor
        The weights left, zero where pruned, of the dtype of ``weight``.
    """
    new = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
    kept = torch.ones_like(new, dtype=torch.bool)
    gram = gram.to(new).clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    new[:, dead] = 0
    inverse = torch.cholesky_inverse(_cholesky(_damped(gram, damping)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    features = new.shape[1]
    block = _BLOCK if pattern is None else max(pattern[1], _BLOCK // pattern[1] * pattern[1])
    for start in range(0, features, block):
        end = min(start + block, features)
        part, local = new[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(part)
        if pattern is None:
            saliency = part.square() / local.diagonal().square()
            prune = round(len(new) * end * (1 - density)) - round(len(new) * start * (1 - density))
            chosen = torch.ones(saliency.numel(), dtype=torch.bool, device=new.device)
            chosen[saliency.flatten().topk(prune, largest=False).indices] = False
            kept[:, start:end] = chosen.view_as(saliency)
        for j in range(end - start):
            if pattern is not None and j % pattern[1] == 0:
                n, m = pattern
                group = slice(j, j + m)
                saliency = part[:, group].square() / local.diagonal()[group].square()
                pruned = saliency.topk(m - n, dim=1, largest=False).indices
                kept[:, start + j : start + j + m].scatter_(1, pruned, False)
            column = part[:, j].clone()
            part[:, j] = column * kept[:, start + j]
            errors[:, j] = (column - part[:, j]) / local[j, j]
            part[:, j + 1 :] -= errors[:, j : j + 1] * local[j, j + 1 :]
        new[:, end:] -= errors @ upper[start:end, end:]
    return kept, (new * kept).to(weight.dtype)


def _damped(gram: Tensor, damping: float) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # Inputs that are all zero have no norm to take a share of.
    extra = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return gram + extra[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _cholesky(gram: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(gram)
    except RuntimeError as error:
        raise SearchDivergedError(
            "the Gram matrix of a layer's inputs is not positive definite: an input is NaN or infinite, or "
            "the damping is too small"
        ) from error
