"""Train the masks of a whole network to give the dense network's outputs, after its blocks were searched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nni_jackpot.errors import MaskError
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batches import inputs_of
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.search.blockwise.blocks import blocks_of
from nni_jackpot.search.blockwise.scores import NOTHING, ScoreTraining, masked_weights
from nni_jackpot.search.blockwise.search import held_out_of, nni_masks, order_of
from nni_jackpot.search.blockwise.targets import Target, chosen_targets

Loss = Callable[[Any, Any, Any], Tensor]
"""Of the output of the sparse network, that of the dense one, and the batch."""


@dataclass(frozen=True)
class Polish:
    """Settings of a polish.

    Attributes
    ----------
    steps
        Number of steps, of one batch each.
    lr, momentum
        Of the SGD that trains the scores.
    checks
        How often the masks are compared on the held-out batches.
    held_out
        Share of the batches that masks are compared on, and not trained on; one batch at least.
    seed
        Decides the order of batches.
    """

    steps: int = 400
    lr: float = 0.002
    momentum: float = 0.9
    checks: int = 8
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.checks < 1:
            raise ValueError("steps must be 0 at least, and checks 1 at least")
        if self.lr <= 0 or not 0 <= self.momentum < 1 or not 0 < self.held_out < 1:
            raise ValueError("lr must be positive, momentum in [0, 1) and held_out in (0, 1)")


def polish(
    model: nn.Module,
    batches: Iterable[Any],
    masks: Masks,
    loss: Loss,
    targets: Mapping[str, Target] | None = None,
    *,
    sparse_pattern: str | None = None,
    sparse_ratio: float | None = None,
    blocks: Sequence[str] | None = None,
    settings: Polish | None = None,
    on_check: Callable[[int, float], None] | None = None,
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
    with restored_modes(model):
        model.eval()

        def loss_of(i: int, parameters: dict[str, Tensor]) -> Tensor:
            args, kwargs = inputs_of(model, batches[i])
            with torch.no_grad():
                dense = model(*args, **kwargs)
            return loss(functional_call(model, parameters, args, kwargs), dense, batches[i])

        def held_out_loss(kept: Mapping[str, Tensor]) -> float:
            masked = masked_weights(weights, targets, kept)
            with torch.no_grad():
                return sum(loss_of(i, masked).item() for i in held_out) / len(held_out)

        trained, held_out = held_out_of(len(batches), settings.held_out)
        best, lowest = kept, held_out_loss(kept)
        if on_check is not None:
            on_check(0, lowest)
        scores = {
            name: target.grains.reduce(weights[name].detach().abs(), lambda values: values.mean(-1))
            for name, target in targets.items()
        }
        for name, score in scores.items():
            score /= 2 * score.mean(targets[name].scale_dims, keepdim=True).clamp_min(NOTHING)
            score += kept[name]
        training = ScoreTraining(
            weights, targets, kept, scores, settings.lr, settings.momentum, settings.steps
        )
        check = max(1, settings.steps // settings.checks)
        for step, i in enumerate(order_of(trained, settings.steps, settings.seed), 1):
            training.step(loss_of(i, training.masked()))
            if step % check == 0 or step == settings.steps:
                found = held_out_loss(training.kept)
                if on_check is not None:
                    on_check(step, found)
                if found < lowest:
                    best, lowest = dict(training.kept), found
    return nni_masks(model, targets, best)


def _grains_kept(masks: Masks, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return which grains NNI's masks keep, by the names of parameters."""
    kept = {}
    for name, target in targets.items():
        module, _, parameter = name.rpartition(".")
        mask = masks.get(module, {}).get(parameter)
        if mask is None or tuple(mask.shape) != target.grains.shape:
            raise MaskError(f"{name} has no mask of its shape {target.grains.shape}: search its block first")
        kept[name] = target.grains.of_mask(mask)
        if not torch.equal(target.select(kept[name].float()), kept[name]):
            raise MaskError(
                f"the mask of {name} keeps {int(kept[name].sum())} grains, which is not {target.keep}, as "
                f"many in each of {target.grains.rows} rows"
            )
    return kept
