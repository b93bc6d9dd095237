"""What a search block by block searches: parameters, their grains, and how many of these are kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nni_jackpot.errors import (
    BlocksError,
    NothingKeptError,
    SparseRatioError,
    TargetWithoutParametersError,
)
from nni_jackpot.masking.activations.layers import is_matrix_layer
from nni_jackpot.masking.granularity import Grains, parse_pattern
from nni_jackpot.modules.layouts import layout_of
from nni_jackpot.modules.parameters import names_of_all


@dataclass(frozen=True)
class Target:
    """The grains of one searched parameter, and how many of them are kept.

    Attributes
    ----------
    grains
        The grains.
    keep
        How many grains are kept, in all rows together.
    output_dim
        Dimension of the output features: 0, but 1 for Conv1D of transformers.
    """

    grains: Grains
    keep: int
    output_dim: int = 0

    @property
    def scale_dims(self) -> tuple[int, ...]:
        """Dimensions of the scores over which a common scale is taken.

        Grains of different output features do not compete if every feature keeps a fixed number. The
        features then get scales of their own, so that those of small effect are searched as well.
        """
        shape = self.grains.score_shape
        outputs = shape[self.output_dim]
        if self.grains.scaler is not None or self.grains.rows % outputs:
            return tuple(range(len(shape)))
        return tuple(i for i in range(len(shape)) if i != self.output_dim)

    def select(self, scores: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return the mask of scores: boolean, of the scores' shape, with exactly ``keep`` grains.

        Parameters
        ----------
        scores
            One score per grain.
        previous
            The mask before, whose grains win ties; None without one.
        """
        return self.grains.select(scores, self.keep, previous)


def targets_of(
    model: nn.Module,
    blocks: Sequence[str],
    sparse_pattern: str | None = None,
    sparse_ratio: float | None = None,
) -> dict[str, Target]:
    """Return targets for the weights of all Linear and convolution layers, and Conv1D, within blocks.

    Parameters
    ----------
    model
        The network.
    blocks
        Names of its blocks.
    sparse_pattern
        ``"N:M"``: N weights of every M consecutive inputs are kept. Layers whose number of inputs M does not
        divide are left out.
    sparse_ratio
        Share of zeros in [0, 1), the same in every row of a weight: of each output feature.

    Returns
    -------
    dict
        By the names of parameters, in the order of the network.

    Raises
    ------
    SparseRatioError
        If not exactly one of ratio and pattern is given, or the ratio is outside [0, 1).
    NothingKeptError
        If the ratio leaves no weight of a row.
    TargetWithoutParametersError
        If the blocks have no such layer.
    """
    if (sparse_pattern is None) == (sparse_ratio is None):
        raise SparseRatioError("give either sparse_pattern or sparse_ratio, such as sparse_pattern='2:4'")
    if sparse_ratio is not None and not 0 <= sparse_ratio < 1:
        raise SparseRatioError(f"sparse_ratio must lie in [0, 1), got {sparse_ratio}")
    targets: dict[str, Target] = {}
    for block in blocks:
        for name, layer in model.get_submodule(block).named_modules(prefix=block):
            if not is_matrix_layer(layer):
                continue
            weight: Tensor = layer.weight
            shape, inputs = tuple(weight.shape), layout_of(layer, "weight").input_dim
            if sparse_pattern is not None:
                n, m = parse_pattern(sparse_pattern)
                if shape[inputs] % m:
                    continue
                rows = math.prod(shape) // m
                grains = Grains(shape, rows=rows, row_dim=inputs)
                keep = n * rows
            else:
                # Rows of Conv1D run along its first dimension, others are in memory order.
                rows = shape[1 - inputs]
                length = math.prod(shape) // rows
                keep = rows * (length - round(length * float(sparse_ratio or 0)))
                if keep == 0:
                    raise NothingKeptError(
                        f"none of the {length} weights of a row of {name} would be kept at sparse_ratio "
                        f"{sparse_ratio}: lower it"
                    )
                grains = Grains(shape, rows=rows, row_dim=0 if inputs == 0 else None)
            targets[f"{name}.weight"] = Target(grains, keep, output_dim=1 - inputs)
    if not targets:
        raise TargetWithoutParametersError(
            f"the blocks {blocks[0]} to {blocks[-1]} have no Linear, convolution or Conv1D layer that "
            f"{'sparse_pattern ' + repr(sparse_pattern) if sparse_pattern else 'sparse_ratio'} fits"
        )
    return targets


def chosen_targets(
    model: nn.Module,
    blocks: Sequence[str],
    targets: Mapping[str, Target] | None,
    sparse_pattern: str | None,
    sparse_ratio: float | None,
) -> Mapping[str, Target]:
    """Return the given targets, or those of a pattern or ratio (`targets_of`).

    Raises
    ------
    SparseRatioError
        If not exactly one of targets, pattern and ratio is given.
    BlocksError
        If another part of the network holds a target's weight as well, so that a mask would change it too.
    """
    if targets is None:
        targets = targets_of(model, blocks, sparse_pattern, sparse_ratio)
    elif sparse_pattern is not None or sparse_ratio is not None:
        raise SparseRatioError("give targets, or one of sparse_pattern and sparse_ratio, not both")
    names = defaultdict(list)
    for name, parameter in names_of_all(model).items():
        names[id(parameter)].append(name)
    for name in targets:
        others = [other for other in names[id(model.get_parameter(name))] if other != name]
        if others:
            raise BlocksError(f"{name} is the same weight as {others[0]}: leave it out of the targets")
    return targets


def by_block(blocks: Sequence[str], targets: Mapping[str, Target]) -> list[dict[str, Target]]:
    """Return the targets of every block, by the names of parameters within the block.

    Raises
    ------
    TargetWithoutParametersError
        If a target is in none of the blocks.
    """
    found: list[dict[str, Target]] = [{} for _ in blocks]
    for name, target in targets.items():
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        if not inside:
            raise TargetWithoutParametersError(f"{name} is in none of the blocks {', '.join(blocks)}")
        found[inside[-1]][name.removeprefix(f"{blocks[inside[-1]]}.")] = target
    return found


def as_numbers(target: Target, kept: Tensor, weight: Tensor) -> Tensor:
    """Return the mask of grains as numbers of the weight's shape and dtype."""
    return target.grains.expand(kept).to(weight.dtype).expand(weight.shape)


def row_groups(target: Target, indices: Tensor) -> Tensor | None:
    """Return the groups of columns within which weights of a row may be swapped.

    Parameters
    ----------
    target
        The target.
    indices
        Flat index of every weight of the parameter, as the rows of a matrix, of shape (out, in).

    Returns
    -------
    Tensor or None
        Indices of columns, of shape (groups, columns of a group), one group of all columns if every row may
        be swapped as a whole; None if grains are not weights, or differ from row to row.
    """
    grains = target.grains
    if grains.scaler is not None:
        return None
    number = torch.arange(grains.rows, device=indices.device)[:, None]
    row_of = grains.of_rows(number.expand(grains.rows, grains.count // grains.rows)).flatten()[indices]
    if (row_of == row_of[:, :1]).all():
        return torch.arange(indices.shape[1], device=indices.device)[None]
    sizes = row_of[0].unique(return_counts=True)[1]
    if not (sizes == sizes[0]).all():
        return None
    groups = row_of[0].argsort(stable=True).view(len(sizes), -1)
    in_groups = row_of[:, groups]
    return groups if (in_groups == in_groups[..., :1]).all() else None
