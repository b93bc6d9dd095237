"""SET, against its update written out weight by weight."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_jackpot.training import SET, Step


def layer(size: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return a mask and weights of a layer, random ones."""
    generator = torch.Generator().manual_seed(size)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:kept]] = True
    return mask, torch.randn(size, generator=generator) * mask


def update(mask: Tensor, weight: Tensor, number: int, seed: int = 0, every: int | None = 10) -> Tensor:
    """Return the mask after an update."""
    masks = {"a": mask.clone()}
    comparator = SET(every=every)
    comparator.update(
        masks, {"a": weight}, {"a": torch.zeros_like(weight)}, Step(number, 100, 0.1, {}, {}, seed, epochs=5)
    )
    return masks["a"]


def test_an_update_is_the_one_of_algorithm_2() -> None:
    mask, weight = layer(100, 40)
    after = update(mask, weight, 10)
    kept = mask.nonzero()[:, 0].tolist()
    positive = sorted((i for i in kept if weight[i] > 0), key=lambda i: weight[i].item())
    negative = sorted((i for i in kept if weight[i] < 0), key=lambda i: -weight[i].item())
    dropped = set(positive[: int(0.3 * len(positive))]) | set(negative[: int(0.3 * len(negative))])
    assert dropped
    new = set(after.nonzero()[:, 0].tolist()) - set(kept)
    assert set(kept) - set(after.nonzero()[:, 0].tolist()) == dropped
    assert len(new) == len(dropped)
    assert after.sum() == 40


def test_draws_depend_on_seed_and_step_alone() -> None:
    mask, weight = layer(100, 40)
    first = update(mask, weight, 10)
    torch.rand(3)
    assert torch.equal(first, update(mask, weight, 10))
    assert not torch.equal(first, update(mask, weight, 20))
    assert not torch.equal(first, update(mask, weight, 10, seed=1))


def test_updates_come_once_an_epoch_by_default() -> None:
    mask, weight = layer(100, 40)
    changed = [n for n in range(1, 101) if not torch.equal(update(mask, weight, n, every=None), mask)]
    assert changed == [20, 40, 60, 80]


def test_a_dense_layer_stays_dense_and_a_nearly_dense_one_keeps_its_number() -> None:
    for kept in (100, 95, 0):
        mask, weight = layer(100, kept)
        assert update(mask, weight, 10).sum() == kept
