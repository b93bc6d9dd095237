from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain_space import masked_parameter, small
from torch import nn
from torch.nn import functional as F

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.refresh import Mode, update_masks
from nni_jackpot.masking.score_groups import initial_scores


def test_initial_scores() -> None:
    kept = torch.tensor([True, False])
    scores = initial_scores(kept, 1.0, 0.95, torch.bfloat16)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.tensor([1.0, 0.95]))
    assert initial_scores(kept, 2.0, -1.0, torch.float64).dtype == torch.float64


def test_forward_is_eq_4_and_backward_is_eq_6() -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    effective = masked.masked(weight)
    assert torch.equal(effective, weight * mask)
    F.linear(x, effective).pow(2).sum().backward()
    # Eq. 6: dL/dm = dL/d(masked weight) * w, at pruned places as well as at kept ones.
    free = (weight * mask).requires_grad_()
    F.linear(x, free).pow(2).sum().backward()
    assert torch.equal(score.grad, free.grad * weight)
    assert score.grad[0, 0] != 0


def test_a_gradient_reaches_what_lies_behind_the_weight() -> None:
    masked = small()
    weight, mask = masked.weight, masked.mask
    scale = torch.tensor(2.0, requires_grad=True)
    masked.masked(weight * scale).sum().backward()
    assert scale.grad == (weight * mask).sum()


@pytest.mark.parametrize("how", ["in place", "data", "optimizer", "fused optimizer"])
def test_the_mask_follows_the_scores_however_they_change(how: str) -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    masked.masked(weight).sum().backward()
    score.grad = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    if how == "in place":
        with torch.no_grad():
            score[0, 0] += 1
    elif how == "data":
        score.data[0, 0] += 1
    else:
        torch.optim.SGD([score], lr=1.0, fused=how == "fused optimizer").step()
    with torch.no_grad():
        effective = masked.masked(weight)
    assert mask.tolist() == [[True, True], [False, False]]
    assert torch.equal(effective, weight * mask)
    assert masked.flips == 2


def test_nothing_is_selected_where_nothing_can_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = small()
    weight = masked.weight
    masked.refresh()
    monkeypatch.setattr("nni_jackpot.masking.refresh.update_top", None)
    with torch.no_grad():
        masked.masked(weight)
        masked.masked(weight)


def test_undo_goes_back_to_the_accepted_mask() -> None:
    masked = small()
    mask, score = masked.mask, masked.score
    masked.refresh()
    masked.last_change.is_accepted = True
    good = mask.clone()
    with torch.no_grad():
        score.copy_(1 - score)
    masked.refresh()
    assert not torch.equal(mask, good)
    masked.last_change.undo(mask, masked.grains)
    assert torch.equal(mask, good)
    masked.last_change.undo(mask, masked.grains)
    assert torch.equal(mask, good)


@pytest.mark.parametrize("flips", [2, 200])
def test_flips_take_no_more_than_a_byte_a_weight(flips: int) -> None:
    weight = torch.randn(20, 30)
    kept = torch.arange(600).view(20, 30) < 300
    score = nn.Parameter(kept.float())
    masked = masked_parameter(weight, score, kept)
    mask = masked.mask
    masked.build_cache(weight)
    good = mask.clone()
    with torch.no_grad():
        score.view(-1)[: flips // 2] = -1.0
        score.view(-1)[300 : 300 + flips // 2] = 2.0
    masked.refresh()
    flipped = masked.state_dict()["flipped"]
    assert flipped.nbytes <= 600
    assert masked.flips == flips == int((mask != good).sum())
    assert torch.equal(masked.build_cache(weight), weight * mask)
    masked.last_change.undo(mask, masked.grains)
    assert torch.equal(mask, good)


def test_nan_leaves_the_mask_alone() -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    good = mask.clone()
    with torch.no_grad():
        score[0, 0] = float("nan")
    with pytest.raises(SearchDivergedError):
        masked.masked(weight)
    assert torch.equal(mask, good)


# -- masked weights that are kept


def test_masked_weights_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = small()
    weight, score = masked.weight, masked.score
    frozen = masked.space.target = nn.Parameter(weight, requires_grad=False)
    first = masked.masked(frozen)
    assert masked.masked(frozen).data_ptr() == first.data_ptr()
    with torch.no_grad():
        score.copy_(1 - score)
    assert torch.equal(masked.masked(frozen), weight * ~small().mask)


@pytest.mark.parametrize("how", ["weight", "weight's data", "dtype", "mask", "copy", "pickle"])
def test_masked_weights_follow_whatever_changes(how: str) -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    frozen = masked.space.target = nn.Parameter(weight, requires_grad=False)
    masked.masked(frozen)
    if how == "weight":
        frozen.copy_(weight + 1)  # as load_state_dict does
    elif how == "weight's data":
        frozen.data = weight * 2
    elif how == "dtype":
        frozen.data = weight.double()  # as model.double() does
    elif how == "mask":
        mask.logical_not_()
        score.data.copy_(torch.where(mask, 1.0, 0.95))
    else:
        masked = copy.deepcopy(masked) if how == "copy" else pickle.loads(pickle.dumps(masked))
        frozen, mask = masked.weight, masked.mask
    effective = masked.masked(frozen)
    assert effective.dtype == frozen.dtype
    assert torch.equal(effective, frozen * mask)


def test_a_forward_has_the_gradient_of_its_own_masked_weights_whatever_comes_before_backward() -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    frozen, x = nn.Parameter(weight, requires_grad=False), torch.ones(2, 2, requires_grad=True)
    before = (weight * mask).clone()
    loss = F.linear(x, masked.masked(frozen)).sum()
    with torch.no_grad():
        score.copy_(1 - score)
    after = masked.masked(frozen)
    assert not torch.equal(after, before)
    loss.backward()
    assert torch.equal(x.grad, before.sum(0).expand(2, 2))


@pytest.mark.parametrize("may_write", [False, True])
def test_gradients_are_the_same_where_they_may_be_written_over(may_write: bool) -> None:
    masked = small()
    weight, mask, score = masked.weight, masked.mask, masked.score
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    for _ in range(2):  # accumulated
        F.linear(x, masked.masked(weight, may_write)).pow(2).sum().backward()
    free = (weight * mask).requires_grad_()
    F.linear(x, free).pow(2).sum().backward()
    assert torch.equal(score.grad, 2 * free.grad * weight)
    # A second derivative needs the first one's gradients as they were.
    loss = F.linear(x, masked.masked(weight, may_write)).pow(2).sum()
    (first,) = torch.autograd.grad(loss, score, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), score)
    loss = F.linear(x, free).pow(2).sum()
    (first,) = torch.autograd.grad(loss, free, create_graph=True)
    (expected,) = torch.autograd.grad((first * weight).sum(), free)
    assert torch.allclose(second, expected * weight)


def test_the_search_updates_the_mask_and_forwards_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = small()
    masked.refresh()
    masked.mode = Mode.EAGER
    monkeypatch.setattr("nni_jackpot.masking.refresh.update_top", None)
    for _ in range(3):
        masked.masked(masked.weight).sum().backward()
    with pytest.raises(TypeError):
        update_masks([masked])
