"""Scores of some parameters, trained by the straight-through gradient; the weights stay frozen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.search.blockwise.targets import Target, as_numbers
from nni_jackpot.search.clock import cosine

# Sizes below this count as zero; all float32 numbers divided by it are finite.
NOTHING = 1e-30


class ScoreTraining:
    """A search of masks by edge-popup over frozen weights, for a loss of the caller's.

    Scores are scaled to a mean size of 1, and gradients to a root mean square of 1, both over the weights of
    one output feature (`Target.scale_dims`): ``lr`` is how far a score moves in a step, whatever the loss.
    The learning rate falls to zero along a cosine.

    Parameters
    ----------
    weights
        The frozen weights by name.
    targets
        Grains and their number to keep, by the same names.
    kept
        The masks of the first step: boolean, of the scores' shapes.
    scores
        The initial scores, which decide the masks from the second step on.
    lr, momentum
        Of the SGD that trains the scores.
    steps
        Number of steps to come.

    Attributes
    ----------
    kept
        The masks: boolean, of the scores' shapes.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        kept: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        lr: float,
        momentum: float,
        steps: int,
    ) -> None:
        self.kept = {name: mask.clone() for name, mask in kept.items()}
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._targets = targets
        self._scores: dict[str, nn.Parameter] = {}
        for name, score in scores.items():
            score = score.to(torch.promote_types(score.dtype, torch.float32))
            size = score.abs().mean(targets[name].scale_dims, keepdim=True)
            self._scores[name] = nn.Parameter(score / size.clamp_min(NOTHING))
        self._optimizer = torch.optim.SGD(self._scores.values(), lr=lr, momentum=momentum)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: cosine(min(1.0, step / max(1, steps)))
        )
        self._leaves: dict[str, Tensor] = {}

    def masked(self) -> dict[str, Tensor]:
        """Return the masked weights for the loss of the next step."""
        self._leaves = masked_weights(self._weights, self._targets, self.kept)
        for leaf in self._leaves.values():
            leaf.requires_grad_()
        return self._leaves

    def step(self, loss: Tensor) -> None:
        """Move the scores by the gradient of a loss of the last `masked` weights; let the masks follow.

        Raises
        ------
        SearchDivergedError
            If the loss is NaN or infinite, or a score becomes NaN.
        """
        if not loss.isfinite():
            raise SearchDivergedError(f"the loss became {loss.item()}")
        gradients = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        with torch.no_grad():
            for name, gradient in zip(self._leaves, gradients, strict=True):
                if gradient is not None:
                    products, target = gradient * self._weights[name], self._targets[name]
                    pooled = target.grains.reduce(products, lambda values: values.sum(-1))
                    pooled = pooled.to(self._scores[name].dtype)
                    size = pooled.square().mean(target.scale_dims, keepdim=True).sqrt_()
                    self._scores[name].grad = pooled / size.clamp_min_(NOTHING)
            self._optimizer.step()
            self._schedule.step()
            for name, score in self._scores.items():
                self.kept[name] = self._targets[name].select(score, self.kept[name])
        self._leaves = {}


def masked_weights(
    weights: Mapping[str, Tensor], targets: Mapping[str, Target], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return weights with zeros where the masks have them."""
    return {
        name: weights[name].detach() * as_numbers(targets[name], kept[name], weights[name]) for name in kept
    }
