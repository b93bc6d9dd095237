"""RigL, against its update written out weight by weight."""

from __future__ import annotations

import math

import torch

from nni_jackpot.training import RigL, Step


def test_an_update_is_the_one_of_algorithm_1() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 40)
    mask = torch.rand(40) < 0.5
    weight[~mask] = 0
    kept = mask.nonzero()[:, 0].tolist()
    before = mask.clone()
    comparator = RigL(every=10, until=0.75)
    comparator.update({"a": mask}, {"a": weight}, {"a": gradient}, Step(10, 100, 0.1, {}, {}))

    count = int(0.3 / 2 * (1 + math.cos(10 * math.pi / 75)) * len(kept))
    dropped = sorted(kept, key=lambda i: abs(weight[i].item()))[:count]
    stay = set(kept) - set(dropped)
    grown = sorted(set(range(40)) - stay, key=lambda i: -abs(gradient[i].item()))[:count]
    assert count > 0
    assert set(mask.nonzero()[:, 0].tolist()) == stay | set(grown)
    assert mask.sum() == before.sum()


def test_masks_change_only_when_an_update_is_due() -> None:
    comparator = RigL(every=10, until=0.75)
    for number in (9, 11, 80, 100):
        mask = torch.arange(10) < 5
        comparator.update(
            {"a": mask}, {"a": torch.rand(10)}, {"a": torch.rand(10)}, Step(number, 100, 0.1, {}, {})
        )
        assert mask.tolist() == [True] * 5 + [False] * 5


def test_a_dense_layer_stays_dense() -> None:
    mask = torch.ones(10, dtype=torch.bool)
    RigL(every=1).update({"a": mask}, {"a": torch.rand(10)}, {"a": torch.rand(10)}, Step(1, 9, 0.1, {}, {}))
    assert mask.all()
