"""Criteria that see activations, against plain derivations of the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.activations.criteria import sparsegpt, sparsegpt_update, wanda
from nni_jackpot.masking.activations.input_statistics import InputWatcher, from_rows, to_rows


class Conv1D(nn.Module):
    """As of transformers: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (3, 7, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2, bias=False), (2, 4, 5, 7)),
    "same": (lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_are_of_what_rows_are_multiplied_by(kind: str) -> None:
    """|W X|^2 by the Gram matrix is the square of the layer's output, without its bias."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    batches = [torch.randn(shape) for _ in range(3)]
    with InputWatcher({"layer": layer}, gram=True) as watcher, torch.no_grad():
        outputs = [layer(x) for x in batches]
    statistics = watcher.statistics["layer"]
    rows = to_rows(layer, layer.weight.detach())
    assert torch.equal(from_rows(layer, rows), layer.weight)
    energy = (rows @ statistics.gram * rows).sum()
    bias = getattr(layer, "bias", None)
    for output in outputs:
        if bias is not None:
            output -= bias.detach() if output.dim() == 3 else bias.detach()[:, None, None]
    torch.testing.assert_close(energy, sum(o.square().sum() for o in outputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.squares, statistics.gram.diagonal(dim1=1, dim2=2))
    with InputWatcher({"layer": layer}) as squares_only, torch.no_grad():
        for x in batches:
            layer(x)
    torch.testing.assert_close(squares_only.statistics["layer"].squares, statistics.squares)
    assert squares_only.statistics["layer"].samples == statistics.samples
    assert not layer._forward_pre_hooks


def test_tokens_that_do_not_count_are_left_out() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 4, 6)
    counted = torch.tensor([[True, True, False, False], [True, False, False, False]])
    with InputWatcher({"layer": layer}, gram=True) as watcher:
        watcher.tokens = counted
        layer(x)
    torch.testing.assert_close(watcher.statistics["layer"].squares[0], x[counted].square().sum(0))
    assert watcher.statistics["layer"].samples == 3


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    inputs = torch.tensor([[3.0, 0.0], [4.0, 1.0]])  # two samples of two features
    importance = wanda(weight, inputs.square().sum(0))
    assert importance.tolist() == [[5.0, 3.0], [2.5, 2.0]]


def test_sparsegpt_is_the_least_error_of_removing_a_weight() -> None:
    """The saliency equals the error that least squares leaves, when all other weights adapt."""
    torch.manual_seed(0)
    inputs = torch.randn(5, 40, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64)
    found = sparsegpt(weight, inputs @ inputs.T, damping=0.0)
    for row in range(3):
        for column in range(5):
            others = [i for i in range(5) if i != column]
            target = (weight[row] @ inputs)[:, None]
            rest = inputs[others].T
            left = target - rest @ torch.linalg.lstsq(rest, target).solution
            torch.testing.assert_close(found[row, column], left.square().sum())


def textbook_sparsegpt(weight: Tensor, gram: Tensor, keep: int, size: int) -> tuple[Tensor, Tensor]:
    """Remove weights one by one by the optimal-brain-surgeon update, with the inverse of what is left."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    features = weight.shape[1]
    damped = gram + torch.eye(features, dtype=gram.dtype) * 0.01 * gram.diagonal().mean()
    for start in range(0, features, size):
        saliency = torch.empty(len(weight), size, dtype=weight.dtype)
        for j in range(size):
            inverse = torch.linalg.inv(damped[start + j :, start + j :])
            saliency[:, j] = weight[:, start + j].square() / inverse[0, 0]
        kept[:, start : start + size].scatter_(1, saliency.topk(size - keep, largest=False).indices, False)
        for column in range(start, start + size):
            inverse = torch.linalg.inv(damped[column:, column:])
            removed = weight[:, column] * ~kept[:, column]
            weight[:, column:] -= removed[:, None] / inverse[0, 0] * inverse[0]
    return kept, weight * kept


def test_sparsegpt_with_update_against_the_textbook() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 600, dtype=torch.float64)  # more columns than are updated at once
    inputs[1:] += 0.5 * inputs[:-1]
    weight = torch.randn(3, 256, dtype=torch.float64)
    gram = inputs @ inputs.T
    kept, updated = sparsegpt_update(weight, gram, pattern=(2, 4))
    expected_kept, expected = textbook_sparsegpt(weight, gram, 2, 4)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(updated, expected)
    masked = (weight - weight * kept) @ inputs
    assert ((weight - updated) @ inputs).square().sum() < 0.8 * masked.square().sum()


def test_sparsegpt_keeps_the_density() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 300)
    inputs[7] = 0  # a feature that is never seen
    kept, updated = sparsegpt_update(torch.randn(8, 200), inputs @ inputs.T, density=0.25)
    assert kept.sum() == 8 * 200 // 4
    assert updated.isfinite().all()
    assert (updated[~kept] == 0).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SearchDivergedError, match="not positive definite"):
        sparsegpt(torch.ones(2, 2), torch.full((2, 2), torch.nan))
