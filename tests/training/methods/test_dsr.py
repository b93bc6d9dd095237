"""DSR, against Algorithm 1 written out weight by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nni_jackpot.training import DSR, Step


@pytest.mark.parametrize(("share", "factor"), [(0.9, 2), (0.01, 0.5)])
def test_an_update_is_the_one_of_algorithm_1(share: float, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    size, kept = {"a": 200, "b": 100, "dense": 9}, {"a": 60, "b": 20, "dense": 9}
    masks = {n: torch.randperm(size[n], generator=generator) < kept[n] for n in size}
    weights = {n: torch.randn(size[n], generator=generator) * masks[n] for n in size}
    before = {n: set(masks[n].nonzero()[:, 0].tolist()) for n in size}
    memory: dict[str, Any] = {}
    copies = {n: mask.clone() for n, mask in masks.items()}
    comparator = DSR(every=10, threshold=0.5, share=share)
    comparator.update(masks, weights, {}, Step(10, 100, 0.1, {}, memory, 3, kept))
    comparator.update(copies, weights, {}, Step(10, 100, 0.1, {}, {}, 3, kept))

    stay = {n: {i for i in before[n] if abs(weights[n][i].item()) >= 0.5} for n in ("a", "b")}
    survivors = len(stay["a"]) + len(stay["b"])
    for n in ("a", "b"):
        after = set(masks[n].nonzero()[:, 0].tolist())
        assert stay[n] <= after
        assert abs(len(after - stay[n]) - (80 - survivors) * len(stay[n]) / survivors) < 1
        assert torch.equal(masks[n], copies[n])
    assert masks["a"].sum() + masks["b"].sum() == 80
    assert masks["dense"].all()
    assert memory["threshold"] == 0.5 * factor
