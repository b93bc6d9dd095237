from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import nni
import numpy as np
import pytest
import torch
from conftest import CONFIG_LIST, Batches, ConvNet, make_evaluator, training_step
from nni.compression.base.compressor import Pruner
from nni.compression.utils import Evaluator, TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.errors import CalibrationError, JackpotError
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.nni_bridge.calibration import losses_of


def wrap(model: nn.Module, evaluator: Evaluator, batches: int = 3) -> tuple[Losses, list[Tensor]]:
    """Wrap a model as NNI's pruners do; return its losses and the weights to prune."""
    pruner = Pruner(model, CONFIG_LIST, evaluator)
    # NNI's order of targets changes from process to process.
    weights = [spaces["weight"].target for _, spaces in sorted(pruner._target_spaces.items())]
    return losses_of(evaluator, model, pruner._get_param_names_map(), iter(weights), batches), weights


class Snapshot:
    """The state of a model and its surroundings that must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flags = [module.training for module in model.modules()]
        self.tensors = [(t, t.detach().clone()) for t in self.state()]
        self.addresses = [t.data_ptr() for t in self.state()]
        self.parameters = [
            (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ]
        self.python, self.numpy, self.torch = self.randoms()

    def state(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @staticmethod
    def randoms() -> tuple[Any, Any, Tensor]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def check(self) -> None:
        now = self.state()
        assert len(now) == len(self.tensors)
        for tensor, (same_tensor, value) in zip(now, self.tensors, strict=True):
            assert tensor is same_tensor
            assert torch.equal(tensor, value)
        assert [t.data_ptr() for t in now] == self.addresses
        assert [module.training for module in self.model.modules()] == self.flags
        for p, (requires_grad, grad, value) in zip(self.model.parameters(), self.parameters, strict=True):
            assert p.requires_grad == requires_grad
            assert p.grad is grad
            assert grad is None or torch.equal(grad, value)
        python, numpy, torch_state = self.randoms()
        assert python == self.python
        assert numpy == self.numpy
        assert torch.equal(torch_state, self.torch)


def run_over(
    batches: Batches, after_step: Callable[[nn.Module], None] = lambda model: None
) -> Callable[..., None]:
    """Return a training loop over the batches that clips gradients and calls a function after every step."""

    def train(
        model: nn.Module, optimizers: Any, training_step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        max_steps = args[1]
        model.train()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for batch in batches[:max_steps]:
            out = training_step(batch, model)
            loss = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, dict) else out[0]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            after_step(model)

    return train


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def seen_by(losses: Losses) -> list[float]:
    seen: list[float] = []
    losses(lambda loss: seen.append(loss.item()))
    return seen


def test_visitor_sees_the_losses_of_the_dense_model_with_their_graphs(
    model: nn.Module, batches: Batches
) -> None:
    model.train()
    expected = []
    for batch in batches[:3]:
        loss = training_step(batch, model)
        slopes = torch.autograd.grad(loss, [model.conv1.weight, model.conv2.weight])
        expected.append((loss.item(), *slopes))
    losses, weights = wrap(model, make_evaluator(model, batches))
    seen = []
    losses(lambda loss: seen.append((loss.item(), *torch.autograd.grad(loss, weights))))
    assert len(seen) == 3
    for (loss, *slopes), (expected_loss, *expected_slopes) in zip(seen, expected, strict=True):
        assert loss == pytest.approx(expected_loss)
        for slope, expected_slope in zip(slopes, expected_slopes, strict=True):
            torch.testing.assert_close(slope, expected_slope)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_changes(model: nn.Module, batches: Batches, train: bool) -> None:
    log: list[float] = []
    losses, weights = wrap(model, make_evaluator(model, batches, log=log))
    model.requires_grad_(False)
    model.bn1.bias.requires_grad_(True)
    model.bn1.bias.grad = torch.ones(8)
    model.train(train)
    model.bn2.train(not train)
    snapshot = Snapshot(model)
    seen = seen_by(losses)
    snapshot.check()
    assert all(not weight.requires_grad for weight in weights)
    assert log == seen  # the loop sees the loss
    assert seen_by(losses) == seen
    snapshot.check()


def test_only_the_weights_take_gradients_within(model: nn.Module, batches: Batches) -> None:
    losses, weights = wrap(model, make_evaluator(model, batches))
    within: list[list[int]] = []
    losses(lambda loss: within.append([id(p) for p in model.parameters() if p.requires_grad]))
    assert within == [[id(weight) for weight in weights]] * 3


def test_a_loop_that_changes_everything_itself(model: nn.Module, batches: Batches) -> None:
    def after_step(model: nn.Module) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.data = p.data.double().float() + 1  # other storage, like after a move to another device
                p.mul_(2)
        model._apply(lambda t: t + 1)  # other buffers
        sum(p.sum() for p in model.parameters()).backward()
        model.eval().requires_grad_(True)
        random.random()
        np.random.rand()
        torch.rand(1)

    evaluator = TorchEvaluator(run_over(batches, after_step), sgd(model), training_step)
    losses, _ = wrap(model, evaluator)
    model.bn1.bias.grad = torch.full((8,), 100.0)  # the loop would clip it
    snapshot = Snapshot(model)
    seen_by(losses)
    snapshot.check()


def test_optimizers_hold_no_parameter_of_the_model(model: nn.Module, batches: Batches) -> None:
    held = []

    def train(model: nn.Module, optimizers: Any, training_step: Any, *args: Any) -> None:
        ids = {id(p) for p in model.parameters()}
        for optimizer in optimizers:
            held.extend(p for group in optimizer.param_groups for p in group["params"] if id(p) in ids)
        run_over(batches)(model, optimizers, training_step, *args)

    optimizers = [
        nni.trace(torch.optim.AdamW)(
            [{"params": [model.conv1.weight], "lr": 0.1}, {"params": model.bn1.weight}]
        ),
        nni.trace(torch.optim.SGD)(model.fc.parameters(), lr=0.1),
    ]
    losses, _ = wrap(model, TorchEvaluator(train, optimizers, training_step))
    assert len(seen_by(losses)) == 3
    assert held == []


@pytest.mark.honours("gradient accumulation")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_accumulation(model: nn.Module, batches: Batches, accumulate: int) -> None:
    log: list[float] = []
    losses, _ = wrap(model, make_evaluator(model, batches, log=log, accumulate=accumulate), batches=2)
    seen = seen_by(losses)
    assert len(log) == 2 * accumulate
    assert seen == log[:2]


def test_every_run_sees_the_same_random_batches(model: nn.Module, batches: Batches) -> None:
    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        images, labels = batches[random.randrange(6)]
        noise = torch.rand(1) + np.random.rand()
        return training_step((F.dropout(images) + noise, labels), model)

    losses, _ = wrap(model, make_evaluator(model, batches, step))
    first = seen_by(losses)
    assert len(set(first)) == 3
    assert seen_by(losses) == first


def test_too_few_batches(model: nn.Module, batches: Batches) -> None:
    evaluator = TorchEvaluator(run_over(batches[:2]), sgd(model), training_step)
    losses, _ = wrap(model, evaluator)
    snapshot = Snapshot(model)
    with pytest.raises(CalibrationError, match="ran 2 of 3 batches") as error:
        seen_by(losses)
    assert isinstance(error.value, JackpotError)
    assert isinstance(error.value, ValueError)
    snapshot.check()
    assert evaluator.model is None


@pytest.mark.parametrize("batches_asked", [0, -1])
def test_batches_must_be_positive(model: nn.Module, batches: Batches, batches_asked: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        wrap(model, make_evaluator(model, batches), batches=batches_asked)


def test_a_loss_without_graph(model: nn.Module, batches: Batches) -> None:
    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return training_step(batch, model).detach()

    losses, _ = wrap(model, make_evaluator(model, batches, step))
    with pytest.raises(CalibrationError, match="none of the weights"):
        seen_by(losses)


@pytest.mark.parametrize("raiser", ["step", "loop", "visitor"])
def test_errors_restore_everything(model: nn.Module, batches: Batches, raiser: str) -> None:
    calls = 0

    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        loss = training_step(batch, model)
        torch.rand(1)
        if raiser == "step" and calls == 2:
            raise KeyError("mine")
        return loss

    def after_step(model: nn.Module) -> None:
        if raiser == "loop":
            raise KeyError("mine")

    def visit(loss: Tensor) -> None:
        if raiser == "visitor":
            raise KeyError("mine")

    evaluator = TorchEvaluator(run_over(batches, after_step), sgd(model), step)
    losses, _ = wrap(model, evaluator)
    snapshot = Snapshot(model)
    with pytest.raises(KeyError, match="mine"):
        losses(visit)
    snapshot.check()
    assert evaluator.model is None
    calls, raiser = 10, ""
    assert len(seen_by(losses)) == 3  # the evaluator can be used again


@pytest.mark.parametrize("kind", [tuple, dict])
def test_steps_that_return_more_than_a_loss(model: nn.Module, batches: Batches, kind: type) -> None:
    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Any:
        loss = training_step(batch, model)
        return {"loss": loss, "outputs": "more"} if kind is dict else (loss, "more")

    losses, _ = wrap(model, TorchEvaluator(run_over(batches), sgd(model), step))
    plain, _ = wrap(clone := ConvNet(), TorchEvaluator(run_over(batches), sgd(clone), training_step))
    clone.load_state_dict(model.state_dict())
    assert seen_by(losses) == seen_by(plain)


def test_losses_of_every_sample_are_averaged(model: nn.Module, batches: Batches) -> None:
    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="none")

    def train(model: nn.Module, optimizer: Any, training_step: Any, *args: Any) -> None:
        for batch in batches[: args[1]]:
            loss = training_step(batch, model)
            assert loss.shape == (16,)
            loss.mean().backward()

    losses, _ = wrap(model, TorchEvaluator(train, sgd(model), step))
    losses(lambda loss: loss.shape == () or pytest.fail("not a scalar"))


@pytest.mark.honours("mixed precision")
def test_gradient_scaler_and_autocast(model: nn.Module, batches: Batches) -> None:
    scales = []

    def train(model: nn.Module, optimizer: Any, training_step: Any, *args: Any) -> None:
        scaler = torch.amp.GradScaler("cpu")
        for batch in batches[: args[1]]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = training_step(batch, model)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())

    losses, weights = wrap(model, TorchEvaluator(train, sgd(model), training_step))
    snapshot = Snapshot(model)

    def visit(loss: Tensor) -> None:
        assert not torch.is_autocast_enabled("cpu")
        assert all(slope.dtype == torch.float32 for slope in torch.autograd.grad(loss, weights))

    losses(visit)
    snapshot.check()
    assert scales == [65536.0] * 3


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "LBFGS", "Adafactor", "NAdam"])
def test_optimizers(model: nn.Module, batches: Batches, name: str) -> None:
    def train(model: nn.Module, optimizer: Any, training_step: Any, scheduler: Any, *args: Any) -> None:
        for batch in batches[: args[0]]:

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = training_step(batch, model)
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()

    optimizer = nni.trace(getattr(torch.optim, name))(model.parameters(), lr=0.1)
    scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1)
    losses, _ = wrap(model, TorchEvaluator(train, optimizer, training_step, scheduler))
    snapshot = Snapshot(model)
    assert len(seen_by(losses)) == 3
    snapshot.check()


def test_evaluation_amid_the_training_is_not_visited(model: nn.Module, batches: Batches) -> None:
    def train(model: nn.Module, optimizer: Any, training_step: Any, *args: Any) -> None:
        for batch in batches[: args[1]]:
            with torch.no_grad():
                assert not training_step(batch, model).requires_grad
            training_step(batch, model).backward()
            optimizer.step()

    losses, _ = wrap(model, TorchEvaluator(train, sgd(model), training_step))
    assert len(seen_by(losses)) == 3


def test_a_parameter_of_the_root_module(batches: Batches) -> None:
    class Rooted(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.shift)

    model = Rooted()
    losses, _ = wrap(model, make_evaluator(model, batches))
    assert len(seen_by(losses)) == 3
