"""Sparse momentum, against Algorithm 1 written out weight by weight."""

from __future__ import annotations

import math

import torch

from nni_jackpot.training import SparseMomentum, Step
from nni_jackpot.training.shares import shares


def test_an_update_is_the_one_of_algorithm_1() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = {"a": 40, "b": 20, "dense": 9}
    size = {"a": 200, "b": 100, "dense": 9}
    masks = {n: torch.randperm(size[n], generator=generator) < kept[n] for n in kept}
    weights = {n: torch.randn(size[n], generator=generator) * masks[n] for n in kept}
    momentum = {n: torch.randn(size[n], generator=generator) * (3 if n == "a" else 1) for n in kept}
    before = {n: set(masks[n].nonzero()[:, 0].tolist()) for n in kept}
    comparator = SparseMomentum(every=10)
    comparator.update(masks, weights, momentum, Step(10, 100, 0.1, momentum, {}, 0, kept))

    rate = 0.2 * (1 + math.cos(math.pi / 10)) / 2
    stay, mean = {}, {}
    for n in ("a", "b"):
        order = sorted(before[n], key=lambda i: abs(weights[n][i].item()))
        stay[n] = set(order[int(rate * len(order)) :])
        mean[n] = sum(abs(momentum[n][i].item()) for i in before[n]) / len(before[n])
    pruned = 60 - len(stay["a"]) - len(stay["b"])
    for n in ("a", "b"):
        missing = sorted(set(range(size[n])) - stay[n], key=lambda i: -abs(momentum[n][i].item()))
        after = set(masks[n].nonzero()[:, 0].tolist())
        count = len(after - stay[n])
        assert abs(count - pruned * mean[n] / sum(mean.values())) < 1
        assert after == stay[n] | set(missing[:count])
    assert masks["a"].sum() + masks["b"].sum() == 60
    assert masks["dense"].all()


def test_what_does_not_fit_goes_to_other_layers() -> None:
    assert shares(10, {"a": 9.0, "b": 1.0}, {"a": 4, "b": 20}) == {"a": 4, "b": 6}
    assert shares(3, {"a": 0.0, "b": 0.0}, {"a": 2, "b": 1}) == {"a": 2, "b": 1}
    assert shares(7, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 9, "b": 9, "c": 9}) == {"a": 3, "b": 2, "c": 2}
