"""Train the masks of a whole network to give the dense network's outputs, after its blocks were searched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from nni_jackpot.errors import MaskError
from nni_jackpot.masks import Masks, named_masks
from nni_jackpot.modules.batches import inputs_of
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.runtime.settings import between, option
from nni_jackpot.search.blockwise.blocks import blocks_of, without_caches
from nni_jackpot.search.blockwise.mask_training import (
    CHECKS,
    RATE,
    STEPS,
    MaskTraining,
    OnCheck,
    held_out_of,
    order_of,
    train_masks,
)
from nni_jackpot.search.blockwise.scores import NOTHING, ScoreTraining
from nni_jackpot.search.blockwise.search import nni_masks
from nni_jackpot.search.blockwise.targets import Target, chosen_targets
from nni_jackpot.search.match_dense import MatchingLoss


@dataclass(frozen=True, kw_only=True)
class Polish(MaskTraining):
    """Settings of a polish.

    Attributes
    ----------
    steps, lr, momentum, checks, held_out, seed
        As for `nni_jackpot.search.blockwise.mask_training.MaskTraining`.
    cache_gib
        Memory for outputs of the dense network, in GiB. Outputs beyond that are computed again for each step.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    steps: int = option("steps, of one batch each; 0 to keep the masks of the start", STEPS, 400)
    lr: float = option("learning rate of the scores at the start", RATE, 0.002)
    checks: int = option("how often masks are compared on the held-out batches", CHECKS, 8)
    cache_gib: float = option(
        "memory for outputs of the dense network, in GiB", between(0, 1e6), 1.0, affects="nothing"
    )


def polish(
    model: nn.Module,
    batches: Iterable[Any],
    masks: Masks,
    loss: MatchingLoss,
    targets: Mapping[str, Target] | None = None,
    *,
    sparse_pattern: str | None = None,
    sparse_ratio: float | None = None,
    blocks: Sequence[str] | None = None,
    settings: Polish | None = None,
    on_check: OnCheck | None = None,
) -> Masks:
    """Train masks end to end, from given ones, and return the best on held-out batches.

    Parameters
    ----------
    model
        The dense network.
    batches
        Calibration data; see `nni_jackpot.modules.batches.call_model`.
    masks
        NNI's masks of all targets, as `search_blocks` returns them.
    loss
        Loss of the sparse network's output, the dense network's output and the batch.
    targets, sparse_pattern, sparse_ratio, blocks
        As for `search_blocks`.
    settings
        Settings of the training.
    on_check
        Called with the number of steps and the loss on the held-out batches.

    Returns
    -------
    Masks
        NNI's masks, whose loss on the held-out batches is not greater than that of ``masks``.

    Raises
    ------
    MaskError
        If a target has no mask, or its mask does not keep the number of grains that the target says.
    SearchDivergedError
        If the loss is NaN or infinite.
    """
    settings = settings or Polish()
    batches = list(batches)
    names = blocks_of(model) if blocks is None and targets is None else list(blocks or ())
    targets = chosen_targets(model, names, targets, sparse_pattern, sparse_ratio)
    weights = {name: model.get_parameter(name) for name in targets}
    kept = _grains_kept(masks, targets)
    with restored_modes(model), without_caches(model):
        model.eval()

        trained, held_out = held_out_of(len(batches), settings.held_out)
        dense = _DenseOutputs(model, batches, settings.cache_gib)

        def loss_of(i: int, masked: dict[str, Tensor]) -> Tensor:
            args, kwargs = inputs_of(model, batches[i])
            return loss(functional_call(model, masked, args, kwargs), dense[i], batches[i])

        def held_out_loss(masked: dict[str, Tensor]) -> float:
            return sum(loss_of(i, masked).item() for i in held_out) / len(held_out)

        best = train_masks(
            ScoreTraining(
                weights,
                targets,
                kept,
                _scores_of(weights, targets, kept),
                settings.lr,
                settings.momentum,
                settings.steps,
            ),
            order_of(trained, settings.steps, settings.seed),
            settings.checks,
            loss_of,
            held_out_loss,
            on_check,
        )
    return nni_masks(model, targets, best.kept)


class _DenseOutputs:
    """The dense network's outputs by the number of the batch; those that fit in memory are computed once."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], gib: float) -> None:
        self._model, self._batches = model, batches
        self._room = gib * 2**30
        self._found: dict[int, Any] = {}

    @torch.no_grad()
    def __getitem__(self, i: int) -> Any:
        if i in self._found:
            return self._found[i]
        args, kwargs = inputs_of(self._model, self._batches[i])
        output = self._model(*args, **kwargs)
        size = sum(x.nbytes for x in tree_leaves(output) if isinstance(x, Tensor))
        if size <= self._room:
            self._room -= size
            self._found[i] = output
        return output


def _scores_of(
    weights: Mapping[str, Tensor], targets: Mapping[str, Target], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return initial scores: half the size of a grain relative to the mean, and 1 more for kept grains."""
    scores = {}
    for name, target in targets.items():
        size = target.grains.reduce(weights[name].detach().abs(), lambda values: values.mean(-1))
        mean = size.mean(target.scale_dims, keepdim=True)
        scores[name] = kept[name] + size / (2 * mean.clamp_min(NOTHING))
    return scores


def _grains_kept(masks: Masks, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return which grains NNI's masks keep, by the names of parameters."""
    kept, given = {}, named_masks(masks)
    for name, target in targets.items():
        mask = given.get(name)
        if mask is None or tuple(mask.shape) != target.grains.shape:
            raise MaskError(f"{name} has no mask of its shape {target.grains.shape}: search its block first")
        kept[name] = target.grains.of_mask(mask)
        if not torch.equal(target.select(kept[name].float()), kept[name]):
            raise MaskError(
                f"the mask of {name} keeps {int(kept[name].sum())} grains, which is not {target.keep}, as "
                f"many in each of {target.grains.rows} rows"
            )
    return kept
