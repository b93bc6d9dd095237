"""Gradual pruning, against Eq. 1 of Zhu and Gupta and magnitudes, weight by weight."""

from __future__ import annotations

import math

import torch

from nni_jackpot.training import Gradual, Step


def test_zeros_follow_the_cubic_law_and_are_exact_at_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    mask, budget = torch.ones(100, dtype=torch.bool), 10
    dense = torch.ones(7, dtype=torch.bool)
    comparator = Gradual(every=10, until=0.75)
    for number in range(1, 101):
        weight = torch.randn(100, generator=generator) * mask
        before = mask.clone()
        step = Step(number, 100, 0.1, {}, {}, 0, {"a": budget, "b": 7})
        comparator.update({"a": mask, "b": dense}, {"a": weight, "b": weight[:7]}, {}, step)
        if number in {10, 20, 30, 40, 50, 60, 70, 75}:
            zeros = 0.9 + (0.0 - 0.9) * (1 - number / 75) ** 3
            assert int(mask.sum()) == math.ceil(100 * (1 - zeros) - 1e-9)
            largest = sorted(before.nonzero()[:, 0].tolist(), key=lambda i: -abs(weight[i].item()))
            assert set(mask.nonzero()[:, 0].tolist()) == set(largest[: int(mask.sum())])
        else:
            assert torch.equal(mask, before)
    assert mask.sum() == budget
    assert dense.all()
