"""Deep R, against Algorithm 1 written out weight by weight."""

from __future__ import annotations

from typing import Any

import torch

from nni_jackpot.training import DeepR, Step


def test_connections_that_cross_zero_are_replaced() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randperm(100, generator=generator) < 40
    weight = torch.randn(100, generator=generator) * mask
    dense, dense_weight = torch.ones(5, dtype=torch.bool), torch.ones(5)
    memory: dict[str, Any] = {}
    comparator = DeepR(l1=2.0, temperature=0.0)
    for number in (1, 2, 3):
        before, old = set(mask.nonzero()[:, 0].tolist()), weight.clone()
        step = Step(number, 9, 0.1, {}, memory, 0, {"a": 40, "d": 5})
        comparator.update({"a": mask, "d": dense}, {"a": weight, "d": dense_weight}, {}, step)
        sign = memory["a"].tolist()
        theta = {i: sign[i] * old[i].item() - 0.1 * 2.0 for i in before}
        stay = {i for i in before if theta[i] >= 0}
        after = set(mask.nonzero()[:, 0].tolist())
        assert stay < after
        assert len(after) == 40
        for i in range(100):
            assert abs(weight[i].item() - (sign[i] * theta[i] if i in stay else 0)) < 1e-6
        assert dense.all()
        assert (dense_weight == 1).all()
        if number == 1:
            signs = sign
            assert all(sign[i] == (1 if old[i] > 0 else -1) for i in before)
        assert sign == signs


def test_noise_has_the_variance_of_the_paper() -> None:
    mask = torch.arange(20_000) < 10_000
    weight = 5.0 * mask
    step = Step(1, 9, 0.5, {}, {}, 0, {"a": 10_000})
    DeepR(l1=0.0, temperature=0.04).update({"a": mask}, {"a": weight}, {}, step)
    assert abs(weight[:10_000].var() - 2 * 0.5 * 0.04) < 0.004
