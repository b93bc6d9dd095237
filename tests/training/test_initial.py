"""Masks of their own, from which trainings from random weights start."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from tiny_training import SIZES, batches, loss_of, losses, network
from torch import Tensor, nn

from nni_jackpot.errors import CalibrationError
from nni_jackpot.training import SNIP, GraSP, initial_masks


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: dict(model.named_parameters())[name] for name in SIZES}


@pytest.mark.parametrize("budget", ["as_configured", "erdos_renyi_kernel", "global_rank", "lamp"])
@pytest.mark.parametrize("keep", [0, 1, 7, 33, 65, 66])
def test_masks_keep_the_exact_number(keep: int, budget: str) -> None:
    masks = initial_masks(weights_of(network()), keep, "magnitude", budget)
    assert sum(int(mask.sum()) for mask in masks.values()) == keep


def test_densities_of_erdos_renyi_are_proportional_to_the_papers() -> None:
    weights = {"a": torch.zeros(64, 32, 3, 3), "b": torch.zeros(128, 64, 3, 3)}
    masks = initial_masks(weights, 9216)
    densities = {name: Fraction(int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    paper = {name: Fraction(sum(w.shape), w.numel()) for name, w in weights.items()}
    assert abs(densities["a"] / densities["b"] / (paper["a"] / paper["b"]) - 1) < 0.01


def test_random_masks_follow_the_seed() -> None:
    weights = {"a": torch.zeros(100)}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(initial_masks(weights, 30)["a"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_snip_keeps_the_weights_of_largest_sensitivity() -> None:
    """Algorithm 1: the derivative by an indicator of each connection, which is one; all layers together."""
    model = network()

    def sensitivity(name: str, i: int) -> float:
        gradient = gradient_of(model)[name].reshape(-1)[i]
        return abs((gradient * weights_of(model)[name].reshape(-1)[i]).item())

    assert kept_by(model, SNIP) == largest(sensitivity)


def test_grasp_keeps_the_gradients_flow() -> None:
    """Algorithm 1: scores -w * Hg, of which the largest go; Hg here by central differences of the gradient."""
    model = network().double()
    weights, gradient, step = weights_of(model), gradient_of(model), 1e-4
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, weight in weights.items():
                weight += sign * step * gradient[name]
        moved.append(gradient_of(model))
        with torch.no_grad():
            for name, weight in weights.items():
                weight -= sign * step * gradient[name]
    product = {name: (moved[0][name] - moved[1][name]) / (2 * step) for name in weights}

    def score(name: str, i: int) -> float:
        return (weights[name].reshape(-1)[i] * product[name].reshape(-1)[i]).item()

    assert kept_by(model, GraSP) == largest(score)


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean gradient over the batches of `losses`."""
    dtype = next(model.parameters()).dtype
    model.train()
    mean = torch.stack([loss_of((x.to(dtype), y), model) for x, y in batches(2)]).mean()
    found = torch.autograd.grad(mean, list(weights_of(model).values()))
    return dict(zip(SIZES, found, strict=True))


def kept_by(model: nn.Module, method: type[SNIP | GraSP]) -> set[tuple[str, int]]:
    dtype = next(model.parameters()).dtype

    def visited(visit: Callable[[Tensor], None]) -> None:
        for x, y in batches(2):
            visit(loss_of((x.to(dtype), y), model.train()))

    masks = initial_masks(weights_of(model), 13, method.paper.masks, method.paper.budget, visited)
    return {(name, i) for name, mask in masks.items() for i in mask.reshape(-1).nonzero()[:, 0].tolist()}


def largest(score: Callable[[str, int], float]) -> set[tuple[str, int]]:
    everything = [(name, i) for name, size in SIZES.items() for i in range(size)]
    return set(sorted(everything, key=lambda one: -score(*one))[:13])


def test_losses_leave_the_network_as_it_was() -> None:
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found: list[Tensor] = []
    losses(model)(found.append)
    assert len(found) == 2
    assert found[0].requires_grad
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_criterion_without_its_evidence_is_refused() -> None:
    for criterion in ("snip", "wanda"):
        with pytest.raises(CalibrationError, match="there are none"):
            initial_masks(weights_of(network()), 7, criterion)
