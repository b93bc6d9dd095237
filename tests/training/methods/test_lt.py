"""Iterative magnitude pruning with rewinding, against the procedure written out."""

from __future__ import annotations

import torch
from tiny_training import SIZES, batches, loss_of, masks_with, network, train

from nni_jackpot.masks import named_masks
from nni_jackpot.training import LT, SparseTraining


def test_rounds_are_those_of_the_procedure() -> None:
    """Three trainings of four epochs of two steps; the network returns to the end of its first epoch."""
    model = network()
    weights = dict(model.named_parameters())
    seen: dict[int, dict[str, torch.Tensor]] = {}
    kept: dict[int, int] = {}

    def on_step(number: int, training: SparseTraining) -> None:
        seen[number] = {name: value.clone() for name, value in model.state_dict().items()}
        kept[number] = sum(int(mask.sum()) for mask in named_masks(training.finish()).values())

    training, _ = train(
        model, LT(rounds=2, rewind=1), masks_with(10, 3), steps=24, epochs=12, on_step=on_step
    )

    # The same by hand.
    other = network()
    own = dict(other.named_parameters())
    alive = {name: torch.ones_like(own[name], dtype=torch.bool) for name in SIZES}
    data = batches()
    number = 0
    for keep in (round(66 * (13 / 66) ** 0.5), 13, None):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        for _ in range(8):
            number += 1
            loss_of(data[number % 4], other).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, mask in alive.items():
                    own[name][~mask] = 0
            if number == 2:
                early = {name: value.clone() for name, value in other.state_dict().items()}
        if keep is None:
            break
        sizes = [
            (abs(own[name].reshape(-1)[i].item()), name, i)
            for name, size in SIZES.items()
            for i in range(size)
            if alive[name].reshape(-1)[i]
        ]
        for _, name, i in sorted(sizes)[: len(sizes) - keep]:
            alive[name].view(-1)[i] = False
        other.load_state_dict(early)
        with torch.no_grad():
            for name, mask in alive.items():
                own[name][~mask] = 0
        assert all(torch.equal(value, seen[number][name]) for name, value in other.state_dict().items())
        assert kept[number] == keep
    assert all(torch.equal(named_masks(training.finish())[name].bool(), mask) for name, mask in alive.items())
    assert all(torch.equal(weights[name], own[name]) for name in weights)


def test_a_round_drops_all_momentum() -> None:
    left: dict[int, int] = {}
    model = network()

    def on_step(number: int, training: SparseTraining) -> None:
        left[number] = len(training._optimizer.state)

    train(model, LT(rounds=1, rewind=0), masks_with(10, 3), steps=8, epochs=4, on_step=on_step)
    assert left[4] == 0
    assert left[3] == left[5] == len(list(model.parameters()))


def test_a_network_can_return_to_its_first_weights() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after: dict[str, torch.Tensor] = {}

    def on_step(number: int, training: SparseTraining) -> None:
        if number == 4:
            after.update({name: value.clone() for name, value in model.state_dict().items()})

    training, _ = train(model, LT(rounds=1, rewind=0), masks_with(10, 3), steps=8, epochs=4, on_step=on_step)
    masks = named_masks(training.finish())
    for name, value in before.items():
        assert torch.equal(after[name], value * masks[name] if name in masks else value)


def test_trainings_are_one_more_than_rounds() -> None:
    assert LT(rounds=3).trainings == 4
