"""Optimal brain damage, against its procedure with the exact diagonal of the Hessian."""

from __future__ import annotations

import pytest
import torch
from tiny_training import SIZES, losses, masks_with, network, train
from torch import Tensor, nn

from nni_jackpot.errors import CalibrationError
from nni_jackpot.masking.criteria import obd
from nni_jackpot.masks import named_masks
from nni_jackpot.training import OBD, SparseTraining


def ranked(model: nn.Module, alive: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Return which weights are left when those of least saliency go, one by one."""
    weights = {name: dict(model.named_parameters())[name] for name in SIZES}
    saliency = obd(weights, losses(model))
    left = [
        (saliency[name].reshape(-1)[i].item(), name, i)
        for name, size in SIZES.items()
        for i in range(size)
        if alive[name].reshape(-1)[i]
    ]
    after = {name: mask.clone() for name, mask in alive.items()}
    for _, name, i in sorted(left)[: len(left) - keep]:
        after[name].view(-1)[i] = False
    return after


def test_the_network_is_pruned_before_each_training() -> None:
    model = network()
    torch.manual_seed(5)
    dense = {name: torch.ones_like(dict(model.named_parameters())[name], dtype=torch.bool) for name in SIZES}
    expected = ranked(model, dense, round(66 * (13 / 66) ** 0.5))
    seen: list[tuple[dict[str, Tensor], nn.Module]] = []

    def on_step(number: int, training: SparseTraining) -> None:
        seen.append(({name: m.bool() for name, m in named_masks(training.finish()).items()}, model))
        if number == 3:
            torch.manual_seed(6)
            expected.update(ranked(model, expected, 13))
        if number == 4:
            assert len(training._optimizer.state) == 0

    torch.manual_seed(5)
    train(model, OBD(rounds=2), masks_with(10, 3), steps=8, on_step=on_step)
    first, second = [masks for masks, _ in seen[:3]], [masks for masks, _ in seen[3:]]
    assert all(
        sum(int(mask.sum()) for mask in masks.values()) == round(66 * (13 / 66) ** 0.5) for masks in first
    )
    assert all(sum(int(mask.sum()) for mask in masks.values()) == 13 for masks in second)
    assert all(not (masks[name] & ~first[0][name]).any() for masks in second for name in masks)


def test_the_first_round_goes_by_saliency() -> None:
    model = network()
    dense = {name: torch.ones_like(dict(model.named_parameters())[name], dtype=torch.bool) for name in SIZES}
    torch.manual_seed(5)
    expected = ranked(model, dense, 13)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = SparseTraining(model, optimizer, masks_with(10, 3), OBD(), losses(model))
    training.begin(4)
    masks = named_masks(training.finish())
    assert all(torch.equal(masks[name].bool(), mask) for name, mask in expected.items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * masks[name] if name in masks else before[name])


def test_without_losses_there_is_no_saliency() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CalibrationError, match="need losses"):
        SparseTraining(model, optimizer, masks_with(10, 3), OBD()).begin(4)
