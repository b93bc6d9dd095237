from __future__ import annotations

import torch

from nni_jackpot.criteria import magnitude, random


def test_magnitude_is_the_absolute_weight() -> None:
    weights = {"a": torch.tensor([-2.0, 1.0, 0.0], requires_grad=True)}
    assert magnitude(weights)["a"].tolist() == [2.0, 1.0, 0.0]
    assert not magnitude(weights)["a"].requires_grad


def test_random_follows_the_seed() -> None:
    weights = {"a": torch.zeros(50), "b": torch.zeros(5, 10)}
    torch.manual_seed(3)
    first = random(weights)
    second = random(weights)
    torch.manual_seed(3)
    again = random(weights)
    assert all(torch.equal(first[key], again[key]) for key in weights)
    assert not torch.equal(first["a"], second["a"])
    assert first["b"].shape == (5, 10)
    assert 0 <= first["a"].min() < first["a"].max() < 1
