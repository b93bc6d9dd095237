"""A step of the scores on a CPU in one pass over memory, soft masks included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from nni_jackpot.masking.cpu.kernels import Step, address, can_run, in_parallel, library
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.refresh import Mode
from nni_jackpot.masking.score_groups import ScoreGroup
from nni_jackpot.masking.soft_mask import sigmoid_of_sample, stride_of_sample
from nni_jackpot.runtime.distributed import world_size
from nni_jackpot.search.optimizers.normalized_sgd import NO_GRADIENT, NormalizedSGD

# Scores from which the kernels are worth the half second that a compiler takes for them.
WORTH = 1 << 20


@dataclass
class _Move:
    """Scores, what moves them, and the parameter to write under their soft mask; None for none."""

    score: Tensor
    grad: Tensor
    momentum: Tensor
    step: Step
    written: MaskedParameter | None

    def at(self, place: int) -> tuple[int, int, int]:
        """Return the addresses of gradients, momentum and scores at a place."""
        return address(self.grad, place), address(self.momentum, place), address(self.score, place)

    def run(self, begin: int, end: int) -> None:
        """Move the scores of a range."""
        if self.written is None:
            library().move(*self.at(begin), end - begin, self.step)
            return
        cache = self.written.cache
        assert cache is not None
        weight, masked = address(cache.weight, begin), address(cache.values, begin)
        library().move_softly(*self.at(begin), end - begin, self.step, weight, masked)


class FusedStep:
    """Does what `NormalizedSGD` and the update of soft masks do, up to the rounding of the last bits.

    Separate operations read and write every number several times, which in a large network takes longer than
    the arithmetic. Searches of several processes are left to PyTorch: their processors may round differently.

    Parameters
    ----------
    optimizer
        The optimizer of the scores.
    groups
        What is searched.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[ScoreGroup]) -> None:
        self._optimizer = optimizer
        self._groups = groups

    @torch.no_grad()
    def take(self) -> list[MaskedParameter] | None:
        """Move the scores by their gradients.

        Returns
        -------
        list of MaskedParameter or None
            The parameters whose cached weights were written under their new soft masks; None if nothing was
            done, because the kernels cannot do it or are not worth their compilation.
        """
        optimizer = self._optimizer
        moving = [group for group in self._groups if group.score.grad is not None]
        if not isinstance(optimizer, NormalizedSGD) or not self._is_fit(moving) or library() is None:
            return None
        moves = self._moves(optimizer, moving)
        _set_sigmoids([move for move in moves if move.written is not None])
        in_parallel([move.score.numel() for move in moves], lambda number, *piece: moves[number].run(*piece))
        return [move.written for move in moves if move.written is not None]

    def _is_fit(self, moving: Sequence[ScoreGroup]) -> bool:
        options = self._optimizer.param_groups[0]
        is_plain = not (options["nesterov"] or options["dampening"] or options["maximize"])
        return bool(
            options["momentum"]
            and is_plain
            and world_size() == 1
            and sum(group.score.numel() for group in moving) >= WORTH
            and all(can_run(group.score, _grad(group)) for group in moving)
        )

    def _moves(self, optimizer: NormalizedSGD, moving: Sequence[ScoreGroup]) -> list[_Move]:
        grads, options = [_grad(group) for group in moving], optimizer.param_groups[0]
        squares = in_parallel(
            [grad.numel() for grad in grads],
            lambda number, begin, end: library().square(address(grads[number], begin), end - begin),
        )
        square_of = dict(zip((group.score for group in moving), squares, strict=True))
        factors: dict[Tensor, float] = {}
        for scores in optimizer.budget_groups:
            found = [score for score in scores if score in square_of]
            size, square = sum(score.numel() for score in found), sum(square_of[score] for score in found)
            factors.update(dict.fromkeys(found, size**0.5 / max(square**0.5, NO_GRADIENT)))
        moves = []
        for group, grad in zip(moving, grads, strict=True):
            score, state = group.score, optimizer.state[group.score]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(score)
            step = Step(factors[score], options["momentum"], options["weight_decay"], options["lr"])
            moves.append(_Move(score, grad, state["momentum_buffer"], step, _written(group)))
        return moves


def _grad(group: ScoreGroup) -> Tensor:
    grad = group.score.grad
    assert grad is not None
    return grad


def _written(group: ScoreGroup) -> MaskedParameter | None:
    """Return the parameter whose cached weights the kernels can write under its soft mask."""
    member, *others = group.members
    is_soft = member.mode is Mode.DEFERRED and member.temperature > 0 and member.keep < member.grains.count
    if others or not is_soft or member.grains.scaler is not None or member.cache is None:
        return None
    return member if can_run(member.cache.weight, member.writable_cache()) else None


def _set_sigmoids(moves: Sequence[_Move]) -> None:
    """Estimate the soft masks of the new scores, from samples that are moved first."""
    strides = [stride_of_sample(move.score.numel()) for move in moves]
    samples = [
        torch.empty(-(-move.score.numel() // stride)) for move, stride in zip(moves, strides, strict=True)
    ]

    def move_sample(number: int, begin: int, end: int) -> None:
        move, stride, out = moves[number], strides[number], address(samples[number], begin)
        library().sample(*move.at(begin * stride), end - begin, move.step, stride, out)

    in_parallel([len(sample) for sample in samples], move_sample)
    for move, sample in zip(moves, samples, strict=True):
        member = move.written
        assert member is not None
        density = member.keep / member.grains.count
        threshold, slope = sigmoid_of_sample(sample, density, member.temperature)
        move.step.threshold, move.step.slope = float(threshold), float(slope)
