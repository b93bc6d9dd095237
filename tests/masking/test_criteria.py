from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, doubles, make_evaluator, training_step
from nni.compression.base.compressor import Pruner
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.nn import functional as F

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.criteria import (
    CRITERIA,
    Losses,
    grasp,
    magnitude,
    needs_of,
    obd,
    random,
    register_criterion,
    snip,
    taylor,
)
from nni_jackpot.nni_bridge.calibration import losses_of


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


def test_the_evidence_that_criteria_need() -> None:
    needs = {name: needs_of(criterion) for name, criterion in CRITERIA.items()}
    assert needs == {
        **dict.fromkeys(("magnitude", "random"), "weights"),
        **dict.fromkeys(("snip", "taylor", "grasp", "obd"), "losses"),
        "wanda": "activations",
        "sparsegpt": "hessians",
    }
    assert needs_of(partial(obd, probes=2)) == "losses"
    assert needs_of(lambda weights: {}) == "weights"
    weights = {"a": torch.ones(2)}
    assert all(CRITERIA[name](weights)["a"].shape == (2,) for name in ("magnitude", "random"))


def test_evidence_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="needs must be one of weights, losses, activations, hessians"):
        register_criterion("mine", needs="labels")
    criterion = partial(magnitude)
    criterion.needs = "labels"
    with pytest.raises(ValueError, match=r"needs must be one of .*, got 'labels'"):
        needs_of(criterion)


# -- losses by hand: a small network in double precision

Weights = dict[str, Tensor]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def data() -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(3)]


def losses_at(net: nn.Module, data: Batches, calls: list[int] | None = None) -> Losses:
    def losses(visit: Callable[[Tensor], None]) -> None:
        for images, labels in data:
            visit(F.cross_entropy(net(images), labels))
        if calls is not None:
            calls.append(len(data))

    return losses


def weights_of(net: nn.Module) -> Weights:
    return {name: p for name, p in net.named_parameters() if name.endswith("weight")}


def mean_loss(net: nn.Module, data: Batches, weights: Weights) -> Tensor:
    return torch.stack([F.cross_entropy(functional_call(net, weights, x), y) for x, y in data]).mean()


def nudge(weights: Weights, key: str, i: int, factor: float) -> Weights:
    """Scale a single weight: what a gate of this value does."""
    changed = {name: weight.detach().clone() for name, weight in weights.items()}
    changed[key].view(-1)[i] *= factor
    return changed


@pytest.mark.honours("init: snip")
@pytest.mark.parametrize("n_batches", [1, 3])
def test_snip_is_the_slope_of_the_loss_in_a_gate(net: nn.Module, data: Batches, n_batches: int) -> None:
    data, weights, step = data[:n_batches], weights_of(net), 1e-6
    importance = snip(weights, losses_at(net, data))
    for key, weight in weights.items():
        assert importance[key].shape == weight.shape
        assert importance[key].dtype == torch.float64
        assert not importance[key].requires_grad
        for i in range(weight.numel()):
            up = mean_loss(net, data, nudge(weights, key, i, 1 + step))
            down = mean_loss(net, data, nudge(weights, key, i, 1 - step))
            slope = abs((up - down) / (2 * step)).item()
            assert importance[key].view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.honours("init: grasp")
@pytest.mark.parametrize("n_batches", [1, 3])
def test_grasp_is_the_weight_times_hessian_times_gradient(
    net: nn.Module, data: Batches, n_batches: int
) -> None:
    data, weights = data[:n_batches], weights_of(net)
    shapes = {name: weight.shape for name, weight in weights.items()}
    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])

    def loss_of(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        given = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return mean_loss(net, data, given)

    hessian = torch.autograd.functional.hessian(loss_of, flat)
    gradient = torch.autograd.functional.jacobian(loss_of, flat)
    calls: list[int] = []
    importance = grasp(weights, losses_at(net, data, calls))
    found = torch.cat([values.flatten() for values in importance.values()])
    torch.testing.assert_close(found, flat * (hessian @ gradient))
    assert found.min() < 0 < found.max()
    assert not found.requires_grad
    assert len(calls) == (1 if n_batches == 1 else 2)


def test_grasp_tells_what_a_removed_weight_does_to_the_gradient_flow(net: nn.Module, data: Batches) -> None:
    """Eq. 15: a step of -w changes the squared norm of the gradient by -2 w * Hg, to first order."""
    data, weights, step = data[:1], weights_of(net), 1e-5

    def flow(weights: Weights) -> float:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        slopes = torch.autograd.grad(mean_loss(net, data, leaves), list(leaves.values()))
        return sum(slope.square().sum().item() for slope in slopes)

    importance = grasp(weights, losses_at(net, data))
    for key, weight in weights.items():
        for i in range(weight.numel()):
            up, down = (flow(nudge(weights, key, i, 1 + sign * step)) for sign in (1, -1))
            change = (down - up) / (2 * step)
            assert -2 * importance[key].view(-1)[i].item() == pytest.approx(change, rel=1e-4, abs=1e-8)


@pytest.mark.honours("init: taylor")
def test_taylor_squares_the_slope_of_every_batch(net: nn.Module, data: Batches) -> None:
    weights = weights_of(net)
    importance = taylor(weights, losses_at(net, data))
    for key, weight in weights.items():
        slopes = [torch.autograd.grad(mean_loss(net, [batch], weights), weight)[0] for batch in data]
        expected = torch.stack([(weight.detach() * slope) ** 2 for slope in slopes]).mean(0)
        torch.testing.assert_close(importance[key], expected)
        assert not importance[key].requires_grad
    # Of one batch the order is that of SNIP; of several it is not.
    for batches, same in ((data[:1], True), (data, False)):
        orders = [c(weights, losses_at(net, batches))["0.weight"].flatten().argsort() for c in (snip, taylor)]
        assert torch.equal(*orders) == same


def test_taylor_does_not_let_slopes_cancel() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))

    def losses(visit: Callable[[Tensor], None]) -> None:
        for sign in (1.0, -1.0):
            visit(weight[0] * sign * 3 + weight[1] * 0.5)

    assert snip({"a": weight}, losses)["a"].tolist() == [0.0, 0.5]
    assert taylor({"a": weight}, losses)["a"].tolist() == [9.0, 0.25]


@pytest.mark.honours("init: obd")
def test_obd_is_exact_where_the_hessian_is_diagonal() -> None:
    """A quadratic loss of several tensors: one random vector is enough."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: nn.Parameter(torch.randn(3, 4, generator=generator).double()) for n in "ab"}
    curvature = {n: torch.randn(3, 4, generator=generator).double() for n in "ab"}

    def losses(visit: Callable[[Tensor], None]) -> None:
        for factor in (0.5, 1.5):
            visit(factor * sum((h * weights[n] ** 2 / 2 + weights[n]).sum() for n, h in curvature.items()))

    for probes in (1, 3):
        importance = obd(weights, losses, probes)
        for name, weight in weights.items():
            torch.testing.assert_close(importance[name], curvature[name] * weight.detach() ** 2 / 2)
            assert not importance[name].requires_grad


def test_obd_of_least_squares() -> None:
    """The Hessian of a linear layer's mean squared error is known: ``2 x x^T / samples`` for every output."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    x, y = torch.randn(50, 6).double(), torch.randn(50, 4).double()
    x *= torch.arange(1, 7)
    probes = 4000
    importance = obd({"w": layer.weight}, lambda visit: visit((layer(x) - y).square().sum(1).mean()), probes)
    hessian = 2 * x.T @ x / 50
    expected = hessian.diagonal() * layer.weight.detach() ** 2 / 2
    # Within five deviations of the mean over the random vectors.
    others = (hessian.square().sum(1) - hessian.diagonal() ** 2).sqrt() / probes**0.5
    bound = 5 * others * layer.weight.detach() ** 2 / 2
    assert ((importance["w"] - expected).abs() <= bound + 1e-12).all()


def test_obd_follows_the_seed_and_leaves_the_loop_alone() -> None:
    weight = nn.Parameter(torch.randn(8))
    drawn: list[float] = []

    def losses(visit: Callable[[Tensor], None]) -> None:
        torch.manual_seed(1)
        visit((weight.sum() * torch.rand(())).square())
        drawn.append(torch.rand(()).item())

    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(obd({"a": weight}, losses)["a"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    snip({"a": weight}, losses)
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("criterion", [snip, taylor, grasp, obd])
def test_a_weight_that_no_loss_depends_on_is_not_important(
    net: nn.Module, data: Batches, criterion: Callable
) -> None:
    spare = nn.Parameter(torch.ones(2, 2).double())
    importance = criterion({"spare": spare, **weights_of(net)}, losses_at(net, data))
    assert torch.equal(importance["spare"], torch.zeros(2, 2).double())
    if criterion is obd:  # its random vectors depend on all shapes
        return
    without = criterion(weights_of(net), losses_at(net, data))
    assert all(torch.equal(importance[key], without[key]) for key in without)


def test_a_linear_loss_has_no_hessian() -> None:
    weight = nn.Parameter(torch.ones(3))
    importance = grasp({"a": weight}, lambda visit: visit((weight * 2).sum()))
    assert torch.equal(importance["a"], torch.zeros(3))


def test_grasp_sees_through_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)

    def losses(visit: Callable[[Tensor], None]) -> None:
        visit(attention(x, x, x, need_weights=False)[0].square().mean())

    importance = grasp({"q": attention.in_proj_weight}, losses)
    assert importance["q"].abs().sum() > 0


@pytest.mark.parametrize(("criterion", "expected"), [(snip, 0.25), (taylor, 0.0625), (grasp, 0.25)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(criterion: Callable, expected: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((2,), 0.5, dtype=dtype))
    n = 1000

    def losses(visit: Callable[[Tensor], None]) -> None:
        for _ in range(n):  # a sum of a thousand equal addends stalls in bfloat16 before it is there
            visit(weight.square().sum() / 2)

    importance = criterion({"a": weight}, losses)["a"]
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance, torch.full((2,), expected))


@pytest.mark.parametrize("criterion", [snip, taylor, grasp, obd])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_importance_that_is_not_finite(criterion: Callable, bad: float) -> None:
    weights = {"fine": nn.Parameter(torch.ones(2)), "bad": nn.Parameter(torch.ones(2))}

    def losses(visit: Callable[[Tensor], None]) -> None:
        visit(weights["fine"].square().sum() + weights["bad"].square().sum() * bad)

    with pytest.raises(SearchDivergedError, match=f"{criterion.__name__} importance of bad is not finite"):
        criterion(weights, losses)


# -- through NNI: wrappers and evaluator


def by_evaluator(model: nn.Module, data: Batches, criterion: Callable, n_batches: int) -> dict:
    evaluator = make_evaluator(model, data)
    pruner = Pruner(model, CONFIG_LIST, evaluator)
    # NNI's order of targets changes from process to process.
    weights = {name: spaces["weight"].target for name, spaces in sorted(pruner._target_spaces.items())}
    losses = losses_of(evaluator, model, pruner._get_param_names_map(), weights.values(), n_batches)
    return criterion(weights, losses)


@pytest.mark.parametrize("criterion", [snip, taylor, grasp])
@pytest.mark.parametrize("n_batches", [1, 3])
def test_an_evaluator_gives_what_a_loop_by_hand_gives(
    model: nn.Module, batches: Batches, criterion: Callable, n_batches: int
) -> None:
    batches = doubles(batches)
    model.double().train()
    weights = {name: getattr(model, name).weight for name in ("conv1", "conv2")}

    def losses(visit: Callable[[Tensor], None]) -> None:
        for batch in batches[:n_batches]:
            visit(training_step(batch, model))

    expected = criterion(weights, losses)
    found = by_evaluator(model, batches, criterion, n_batches)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


# -- several processes


def _importance(rank: int, data: Batches, criterion: Callable, n_batches: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(ConvNet().double())
    importance = by_evaluator(model, data[rank::2], criterion, n_batches)
    return {key.removeprefix("module."): values for key, values in importance.items()}


def _rank(rank: int, folder: Path, data: Batches) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        runs = [(snip, 2), (taylor, 2), (grasp, 2), (grasp, 1)]
        torch.save({(c.__name__, n): _importance(rank, data, c, n) for c, n in runs}, folder / f"{rank}.pt")
    finally:
        gc.collect()  # wrapped models are cycles, and must not outlive the process group that they hold
        distributed.destroy_process_group()


@pytest.mark.honours("DistributedDataParallel")
@pytest.mark.skipif(not distributed.is_available(), reason="PyTorch without torch.distributed")
def test_all_ranks_agree_on_the_importance_over_all_batches(
    model: nn.Module, batches: Batches, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path, doubles(batches)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model.double().train()
    for (name, n_batches), importance in ranks[0].items():
        weights = {key: model.get_submodule(key).weight for key in importance}

        def losses(visit: Callable[[Tensor], None], n_batches: int = n_batches) -> None:
            for batch in doubles(batches[: 2 * n_batches]):
                visit(training_step(batch, model))

        expected = CRITERIA[name](weights, losses)
        for key, values in importance.items():
            assert torch.equal(values, ranks[1][name, n_batches][key])
            torch.testing.assert_close(values, expected[key])
