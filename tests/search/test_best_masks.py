"""A search ends with the best masks that it has compared, those of the start at worst."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator, same, training_step
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import EdgePopup, LotteryJackpotPruner

CONV = {"op_types": ["Conv2d"], "sparse_ratio": 0.8}
LINEAR = {"op_types": ["Linear"], "sparse_ratio": 0.7}


class Encoder(nn.Module):
    """A block of a transformer, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


class Llama(nn.Module):
    """A Llama of one layer, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
        self.embed = nn.Linear(4, 16)
        self.layers = transformers.LlamaModel(config)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(inputs_embeds=self.embed(x), use_cache=False).last_hidden_state
        return self.head(hidden.mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


NETWORKS = {"perceptron": perceptron, "batch norm": with_norm, "transformer": Encoder, "Llama": Llama}


def trained(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a copy of a network that has learnt its batches, and the batches."""
    model, batches = _trained(kind)
    torch.manual_seed(1)  # of dropout in the search
    return copy.deepcopy(model), batches


@lru_cache
def _trained(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = NETWORKS[kind]()
    batches = [(torch.randn(16, 6, 4), torch.randint(3, (16,))) for _ in range(6)]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, batches


def loss_on(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
    return lambda: torch.stack([F.cross_entropy(model(x), y) for x, y in batches]).mean()


def search(
    kind: str, method: Any, steps: int, held_out: bool = True
) -> tuple[LotteryJackpotPruner, nn.Module, Callable[[], Tensor], float, Any]:
    model, batches = trained(kind)
    pruner = LotteryJackpotPruner(model, [LINEAR], method=method)
    loss = loss_on(model, batches)
    before = measured(model, loss)
    start = pruner.get_masks()
    loop = pruner.begin(steps, held_out=loss if held_out else None)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        current = F.cross_entropy(model(x), y)
        current.backward()
        loop.step(current)
    loop.finish()
    return pruner, model, loss, before, start


def measured(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Return the loss in eval mode, batch norm by batch."""
    modes = [(module, module.training) for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model.eval()
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm1d)
    with torch.no_grad():
        result = loss().item()
        for name, value in values.items():
            model.state_dict()[name].copy_(value)
    for module, training in modes:
        module.training = training
    return result


@pytest.mark.parametrize("lr", [None, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_search_ends_worse_than_it_began(kind: str, lr: float | None) -> None:
    method = EdgePopup() if lr is None else EdgePopup(lr=lr)
    for steps in (1, 7, 40):
        _, model, loss, before, _ = search(kind, method, steps)
        assert measured(model, loss) <= before


def test_a_harmful_search_ends_with_the_masks_of_the_start_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pruner, _, _, _, start = search("perceptron", EdgePopup(lr=10.0, momentum=0.0), 2)
    assert same(pruner.get_masks(), start)
    assert "the search ends with its best masks so far" in caplog.text


@pytest.mark.parametrize("kind", NETWORKS)
def test_measuring_changes_no_search_that_improves(kind: str) -> None:
    method = EdgePopup(lr=0.001, ramp_end=0.0, temperature=0.0)
    pruner, model, *_ = search(kind, method, 30)
    twin, twin_model, *_ = search(kind, method, 30, held_out=False)
    assert same(pruner.get_masks(), twin.get_masks())
    state, expected = model.state_dict(), twin_model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def learn(model: nn.Module, batches: Batches) -> None:
    """Let a network learn its batches, so that random masks are worse than magnitude."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        optimizer.zero_grad()
        training_step(batches[step % len(batches)], model).backward()
        optimizer.step()


def test_the_evaluator_s_first_steps_are_measured(model: ConvNet, batches: Batches) -> None:
    learn(model, batches)
    twin = copy.deepcopy(model)
    masks = []
    for own, held_out in ((model, 8), (twin, 0)):
        torch.manual_seed(0)
        pruner = LotteryJackpotPruner(own, [CONV], make_evaluator(own, batches), method=EdgePopup(lr=50.0))
        start = pruner.get_masks()
        masks.append(pruner.compress(max_steps=12, held_out=held_out)[1])
    assert same(masks[0], start)
    assert not same(masks[1], start)


def test_statistics_are_those_of_the_masks_that_were_better(model: ConvNet, batches: Batches) -> None:
    learn(model, batches)
    pruner = LotteryJackpotPruner(model, [CONV], make_evaluator(model, batches), method=EdgePopup(lr=50.0))
    start = pruner.get_masks()
    pruner.compress(max_steps=12)
    assert same(pruner.get_masks(), start)
    found = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    used = [batches[i % len(batches)][0] for i in range(8)]
    pruner.reestimate_norm(used)
    for name, value in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(found[name], value)


def test_a_training_step_that_needs_gradients_ends_no_search(
    model: ConvNet, batches: Batches, caplog: pytest.LogCaptureFixture
) -> None:
    def penalized(batch: Any, own: nn.Module) -> Tensor:
        images = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(own(images), batch[1])
        return loss + torch.autograd.grad(loss, images, create_graph=True)[0].square().sum()

    evaluator = make_evaluator(model, batches, step=penalized)
    LotteryJackpotPruner(model, [CONV], evaluator).compress(max_steps=12)
    assert "cannot be computed again without gradients" in caplog.text


def test_the_first_steps_lower_a_rate_that_harms(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    # A rate of the default's kind, but far too large for the network, as a default could be.
    from nni_jackpot.masking.methods import edge_popup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_popup, "LR", 1.0)
        pruner, model, loss, before, _ = search("transformer", EdgePopup(), 64)
    assert "the search returns to its best masks, with lr 0.1" in caplog.text
    assert pruner._search is not None
    assert pruner._search.optimizer.param_groups[0]["initial_lr"] < 0.11
    assert measured(model, loss) <= before


def test_settings_suit_the_network() -> None:
    def found(kind: str, **settings: Any) -> tuple[float | None, ...]:
        pruner = LotteryJackpotPruner(trained(kind)[0], [LINEAR], method=EdgePopup(**settings))
        return pruner.method.lr, pruner.method.ramp_end, pruner.method.temperature  # type: ignore[attr-defined]

    assert found("batch norm") == (0.003, 0.5, 0.5)
    assert found("transformer") == (0.003, 0.0, 0.0)
    assert found("transformer", lr=0.01, temperature=1.0) == (0.01, 0.0, 1.0)


def test_a_search_resumes_with_its_best_masks() -> None:
    def run(stop: int | None) -> Any:
        model, batches = trained("perceptron")
        pruner = LotteryJackpotPruner(model, [LINEAR])
        loop = pruner.begin(32, held_out=loss_on(model, batches))

        def steps(first: int, last: int) -> None:
            for step in range(first, last):
                x, y = batches[step % len(batches)]
                F.cross_entropy(model(x), y).backward()
                loop.step()

        steps(0, stop or 32)
        if stop is not None:
            saved = copy.deepcopy((model.state_dict(), loop.state_dict()))
            loop = pruner.begin(32, held_out=loss_on(model, batches))
            model.load_state_dict(saved[0])
            loop.load_state_dict(saved[1])
            steps(stop, 32)
        return loop.finish()

    whole = run(None)
    for stop in (3, 5, 17):
        assert same(run(stop), whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kept": []}, "other targets"),
        ({"loss": "low"}, "not a number"),
        ({"next": None}, "another search"),
        ({"more": 1}, "other fields"),
    ],
)
def test_the_best_masks_of_another_search_are_refused(change: dict[str, Any], reason: str) -> None:
    model, batches = trained("perceptron")
    pruner = LotteryJackpotPruner(model, [LINEAR])
    loop = pruner.begin(8, held_out=loss_on(model, batches))
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    loop.step()
    state = loop.state_dict()
    with pytest.raises((ValueError, TypeError), match=reason):
        loop.load_state_dict({**state, "best": {**state["best"], **change}})


def test_masks_are_kept_only_where_they_are_compared() -> None:
    model, batches = trained("perceptron")
    for held_out in (None, loss_on(model, batches)):
        loop = LotteryJackpotPruner(copy.deepcopy(model), [LINEAR]).begin(8, held_out=held_out)
        assert bool(loop.state_dict()["best"]) == (held_out is not None)


def test_best_masks_with_other_counts_are_refused() -> None:
    model, batches = trained("perceptron")
    loop = LotteryJackpotPruner(model, [LINEAR]).begin(8, held_out=loss_on(model, batches))
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    loop.step()
    state = loop.state_dict()
    for forged in (torch.zeros_like, torch.ones_like):
        kept = [forged(packed) for packed in state["best"]["kept"]]
        with pytest.raises(ValueError, match=r"keeps nothing|another number"):
            loop.load_state_dict({**state, "best": {**state["best"], "kept": kept}})
