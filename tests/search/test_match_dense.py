"""Losses without labels."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.search.match_dense import MATCHING_LOSSES, MatchDense, cosine, kl, mse

BATCH = {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def images() -> torch.Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_the_dense_network_has_no_loss_and_a_sparse_one_has(name: str) -> None:
    model = network().eval()
    loss = MatchDense(model, name)
    assert loss(images(), model).item() == pytest.approx(0, abs=1e-5)
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert loss(images(), model).item() > 1e-3
    masked = apply_masks(copy.deepcopy(network()).eval(), pruner.get_masks())
    assert loss(images(), model).item() == pytest.approx(loss(images(), masked).item(), rel=1e-4)
    pruner.unwrap_model()


@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_a_search_in_a_loop_of_one_s_own_lowers_the_loss(name: str) -> None:
    model = network().eval()
    loss = MatchDense(model, name)
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.6}])
    before = loss(images(), model).item()
    search = pruner.begin(total_steps=60)
    for _ in range(60):
        loss(images(), model).backward()
        search.step()
    search.finish()
    assert loss(images(), model.eval()).item() < before


def test_large_weights_are_shared_and_statistics_are_not() -> None:
    model = network()
    dense = MatchDense(model)._dense
    assert dense[0].weight is model[0].weight
    model.train()(images())
    assert not torch.equal(dense[1].running_mean, model[1].running_mean)


def test_padding_does_not_count() -> None:
    dense, sparse = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    other = sparse.clone()
    other[1, 1:] = 9.0
    for loss in (kl, cosine, mse):
        assert torch.equal(loss(sparse, dense, BATCH), loss(other, dense, BATCH))
        assert not torch.equal(loss(sparse, dense, {}), loss(other, dense, {}))


def test_values_by_hand() -> None:
    dense, sparse = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p = F.softmax(dense, 1)
    assert kl(sparse, dense, None).item() == pytest.approx((p * (dense - sparse)).sum().item())
    assert cosine(sparse, dense, None).item() == pytest.approx(1.0)
    assert mse(sparse, dense, None).item() == pytest.approx(4.0)
    outputs = SimpleNamespace(logits=sparse), SimpleNamespace(logits=dense)
    assert kl(*outputs, None).item() == kl(sparse, dense, None).item()


def test_what_has_no_outputs_is_refused() -> None:
    with pytest.raises(TypeError, match="no logits"):
        kl(object(), object(), None)
    with pytest.raises(ValueError, match="kl, cosine, mse"):
        MatchDense(network(), "labels")
