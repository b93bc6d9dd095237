from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nni_jackpot.edge_popup import RelaxedMask, initial_scores
from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.granularity import Grains


def make(keep: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RelaxedMask]:
    weight = torch.tensor([[0.5, -2.0], [3.0, 0.1]])
    mask = torch.tensor([[False, True], [True, False]])
    score = initial_scores(mask, 1.0, 0.95, weight.dtype).requires_grad_()
    return weight, mask, score, RelaxedMask(Grains((2, 2)), keep)


def test_initial_scores() -> None:
    kept = torch.tensor([True, False])
    scores = initial_scores(kept, 1.0, 0.95, torch.bfloat16)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.tensor([1.0, 0.95]))
    assert initial_scores(kept, 2.0, -1.0, torch.float64).dtype == torch.float64


def test_forward_is_eq_4_and_backward_is_eq_6() -> None:
    weight, mask, score, relaxed = make()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    effective = relaxed.apply(weight, score, mask)
    assert torch.equal(effective, weight * mask)
    F.linear(x, effective).pow(2).sum().backward()
    # Eq. 6: dL/dm = dL/d(masked weight) * w, at pruned places as well as at kept ones.
    free = (weight * mask).requires_grad_()
    F.linear(x, free).pow(2).sum().backward()
    assert torch.equal(score.grad, free.grad * weight)
    assert score.grad[0, 0] != 0


def test_a_gradient_reaches_what_lies_behind_the_weight() -> None:
    weight, mask, score, relaxed = make()
    scale = torch.tensor(2.0, requires_grad=True)
    relaxed.apply(weight * scale, score, mask).sum().backward()
    assert scale.grad == (weight * mask).sum()


@pytest.mark.parametrize("how", ["in place", "data", "optimizer", "fused optimizer"])
def test_the_mask_follows_the_scores_however_they_change(how: str) -> None:
    weight, mask, score, relaxed = make()
    relaxed.apply(weight, score, mask).sum().backward()
    score.grad = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    if how == "in place":
        with torch.no_grad():
            score[0, 0] += 1
    elif how == "data":
        score.data[0, 0] += 1
    else:
        torch.optim.SGD([score], lr=1.0, fused=how == "fused optimizer").step()
    with torch.no_grad():
        effective = relaxed.apply(weight, score, mask)
    assert mask.tolist() == [[True, True], [False, False]]
    assert torch.equal(effective, weight * mask)
    assert relaxed.flips == 2


def test_nothing_is_selected_where_nothing_can_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, score, relaxed = make()
    relaxed.refresh(score, mask)
    monkeypatch.setattr("nni_jackpot.edge_popup.update_top", None)
    with torch.no_grad():
        relaxed.apply(weight, score, mask)
        relaxed.apply(weight, score, mask)


def test_undo_goes_back_to_the_accepted_mask() -> None:
    _, mask, score, relaxed = make()
    relaxed.refresh(score, mask)
    relaxed.accept()
    good = mask.clone()
    with torch.no_grad():
        score.copy_(1 - score)
    relaxed.refresh(score, mask)
    assert not torch.equal(mask, good)
    relaxed.undo(mask)
    assert torch.equal(mask, good)
    relaxed.undo(mask)
    assert torch.equal(mask, good)


def test_nan_leaves_the_mask_alone() -> None:
    weight, mask, score, relaxed = make()
    good = mask.clone()
    with torch.no_grad():
        score[0, 0] = float("nan")
    with pytest.raises(SearchDivergedError):
        relaxed.apply(weight, score, mask)
    assert torch.equal(mask, good)
