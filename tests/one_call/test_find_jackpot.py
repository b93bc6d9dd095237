from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import JackpotError, MatchDense, apply_masks, find_jackpot
from nni_jackpot.masks import sparsity_of


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 3)
    ).eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))) for _ in range(5)]


def test_masks_are_found_and_weights_stay(model: nn.Module, batches: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    masks = find_jackpot(model, batches, sparsity=0.75, epochs=2)
    assert sparsity_of(masks) == pytest.approx(0.75, abs=1e-2)
    assert [*masks] == ["0", "4"]
    assert not model.training
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    apply_masks(model, masks)
    zeros = sum((model.get_parameter(f"{name}.weight") == 0).sum() for name in masks)
    assert zeros == int(0.75 * (72 + 512))


def test_other_losses_and_options(model: nn.Module, batches: Any) -> None:
    seen = []

    def loss(batch: Any, model: nn.Module) -> Tensor:
        seen.append(1)
        return F.cross_entropy(model(batch[0]), batch[1])

    entries = [{"op_names": ["4"], "sparse_ratio": 0.5}]
    assert [*find_jackpot(model, batches, epochs=1, loss=loss, config_list=entries, init="random")] == ["4"]
    assert len(seen) >= 5
    assert find_jackpot(model, batches, epochs=1, loss=MatchDense(model, "kl"))


def test_what_will_not_do_leaves_the_model_as_it_was(model: nn.Module, batches: Any) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="train_batches must have a length"):
        find_jackpot(model, iter(batches))
    with pytest.raises(JackpotError):
        find_jackpot(model, batches, sparsity=1.5)

    def broken(batch: Any, model: nn.Module) -> Tensor:
        raise KeyError("x")

    with pytest.raises(KeyError):
        find_jackpot(model, batches, loss=broken)
    assert [name for name, _ in model.named_modules()] == names
