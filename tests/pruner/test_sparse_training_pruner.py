"""Training methods as an NNI pruner: exact zeros, the law, unwrapping and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from conftest import ConvNet, lightning_evaluator, make_evaluator, training_step
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import TorchEvaluator, TransformersEvaluator
from torch import Tensor, nn

from nni_jackpot import SparseTrainingPruner, apply_masks, load_masks, save_masks
from nni_jackpot.errors import ConfigListError, NothingSearchedError, SparseRatioError
from nni_jackpot.training import LT, SET, Gradual, RigL, SparseMomentum

EACH_LAYER = ["rigl", "set", "deep_r", "gradual", "snip", "grasp"]
TOGETHER = ["sparse_momentum", "dsr", "lt"]
RATIO = 0.75
CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": RATIO, "exclude_op_names": ["fc"]}]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10), nn.Linear(10, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {"conv": ConvNet, "mlp": mlp}
STEPS, EPOCHS = 6, 3


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(2)
    ]


def evaluator_of(
    model: nn.Module, batches: Any, step: Callable[..., Tensor] = training_step
) -> TorchEvaluator:
    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        for number in range(max_steps or 0):
            optimizer.zero_grad()
            training_step(batches[number % len(batches)], model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
    return TorchEvaluator(train, optimizer, step)


def zeros(masks: Any) -> dict[str, tuple[int, int]]:
    """Return the number of zeros and of weights of each target."""
    return {
        module: (int((mask == 0).sum()), mask.numel())
        for module, targets in masks.items()
        if (mask := targets["weight"]) is not None
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [*EACH_LAYER, *TOGETHER])
def test_exact_zeros_at_every_moment(method: str, name: str, batches: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    parameters = list(model.parameters())
    seen: list[int] = []

    def watched(batch: Any, model: nn.Module) -> Tensor:
        masks = pruner.get_masks() if pruner is not None else {}
        for module, targets in masks.items():
            weight = model.get_submodule(module).weight
            assert not weight[targets["weight"] == 0].any()
        seen.append(sum(count for count, _ in zeros(masks).values()))
        return training_step(batch, model)

    settings: dict[str, Any] = {
        "rigl": RigL(every=1),
        "sparse_momentum": SparseMomentum(every=1),
        "lt": LT(rounds=2, rewind=0),
    }
    pruner: SparseTrainingPruner | None = None
    pruner = SparseTrainingPruner(
        model, CONFIG, evaluator_of(model, batches, watched), method=settings.get(method, method)
    )
    start = pruner.get_masks()
    seen.clear()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found, masks = pruner.compress(STEPS, EPOCHS)

    assert found is model
    exact = {module: int(RATIO * size) for module, (_, size) in zeros(masks).items()}
    if method in TOGETHER:
        assert sum(count for count, _ in zeros(masks).values()) == sum(exact.values())
    else:
        assert {module: count for module, (count, _) in zeros(masks).items()} == exact
    assert len(seen) == STEPS
    assert seen == sorted(seen)
    assert seen[0] == (0 if pruner.method.is_dense_at_start else sum(exact.values()))
    if method in ("rigl", "set", "deep_r"):  # others may not move in so few steps
        assert any(not torch.equal(start[m]["weight"], masks[m]["weight"]) for m in masks)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    # The law: what has been trained is what a fresh copy with its weights and the exported masks computes.
    images = batches[0][0]
    plain = copy.deepcopy(model)
    save_masks(masks, tmp_path / "masks.pth")
    apply_masks(plain, load_masks(tmp_path / "masks.pth"))
    assert torch.equal(model.eval()(images), plain.eval()(images))
    pruner.unwrap_model()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(images), plain(images))


def test_the_momentum_of_a_weight_that_returns_is_reset(batches: Any) -> None:
    torch.manual_seed(0)
    model = mlp()
    evaluator = evaluator_of(model, batches)
    pruner = SparseTrainingPruner(model, CONFIG, evaluator, method=RigL(every=STEPS - 1, until=1.0))
    numbers: list[int] = []
    after = pruner._after_step

    def watched(optimizer: Any, args: Any, kwargs: Any) -> None:
        before = pruner.get_masks()
        after(optimizer, args, kwargs)
        for module, targets in pruner.get_masks().items():
            weight = model.get_submodule(module).weight
            grown = (targets["weight"] == 1) & (before[module]["weight"] == 0)
            assert not weight[grown].any()
            assert not optimizer.state[weight]["momentum_buffer"][grown].any()
            numbers.append(int(grown.sum()))

    pruner._after_step = watched  # type: ignore[method-assign]
    pruner.compress(STEPS, EPOCHS)
    assert sum(numbers) > 0


def test_a_second_training_begins_with_the_masks_of_the_first(batches: Any) -> None:
    model = mlp()
    pruner = SparseTrainingPruner(model, CONFIG, evaluator_of(model, batches), method="set")
    _, first = pruner.compress(2, 1)
    _, second = pruner.compress(1, 1)
    assert all(torch.equal(first[module]["weight"], second[module]["weight"]) for module in first)


def test_targets_of_their_own_ratio_and_a_global_group(batches: Any) -> None:
    model = mlp()
    config = [
        {"op_names": ["1"], "sparse_ratio": 0.5},
        {"op_names": ["3", "4"], "sparse_ratio": 0.8, "global_group_id": 0},
    ]
    pruner = SparseTrainingPruner(
        model, config, evaluator_of(model, batches), init="magnitude", method="rigl"
    )
    _, masks = pruner.compress(2, 1)
    counts = zeros(masks)
    assert counts["1"][0] == 64 * 12 // 2
    assert counts["3"][0] + counts["4"][0] == int(0.8 * (120 + 30))


def test_lightning_knows_its_steps(batches: Any) -> None:
    module, evaluator = lightning_evaluator(ConvNet(), batches)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": RATIO}]
    pruner = SparseTrainingPruner(module, config, evaluator, method=RigL(every=1))
    start = pruner.get_masks()
    _, masks = pruner.compress(max_steps=None, max_epochs=2)
    assert {count / size for count, size in zeros(masks).values()} == {RATIO}
    assert any(not torch.equal(start[name]["weight"], masks[name]["weight"]) for name in masks)
    for name, targets in masks.items():
        assert not module.get_submodule(name).weight[targets["weight"] == 0].any()


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, num_labels=2, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(1, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    options = {"per_device_train_batch_size": 8, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
    trainer = nni.trace(transformers.Trainer)(model, arguments, train_dataset=rows)
    entry = {"op_types": ["Linear"], "exclude_op_names": ["classifier"], "sparse_ratio": RATIO}
    pruner = SparseTrainingPruner(model, [entry], TransformersEvaluator(trainer), method=RigL(every=1))
    start = pruner.get_masks()
    _, masks = pruner.compress(max_steps=None, max_epochs=2)
    assert all(count == int(RATIO * size) for count, size in zeros(masks).values())
    assert any(not torch.equal(start[name]["weight"], masks[name]["weight"]) for name in masks)
    for name, targets in masks.items():
        assert not model.get_submodule(name).weight[targets["weight"] == 0].any()


def test_model_speedup_takes_the_masks(batches: Any) -> None:
    model = ConvNet()
    pruner = SparseTrainingPruner(model, CONFIG, evaluator_of(model, batches))
    _, masks = pruner.compress(2, 1)
    pruner.unwrap_model()
    images = batches[0][0]
    expected = copy.deepcopy(model.eval())(images)
    small = ModelSpeedup(model, images, masks).speedup_model().eval()
    assert torch.allclose(small(images), expected, atol=1e-5)


# -- refusals, with nothing touched


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({}, {"method": "rigel"}, ValueError, "rigl, set.*did you mean rigl"),
        ({"sparse_ratio": 1.5}, {}, SparseRatioError, "1.5"),
        ({"granularity": "out_channel"}, {}, ConfigListError, "prunes single weights"),
        ({"sparse_pattern": "2:4", "sparse_ratio": None}, {}, ConfigListError, "prunes single weights"),
        ({"dependency_group_id": 1}, {}, ConfigListError, "dependency_group_id"),
        ({}, {"init": "champion"}, ValueError, "champion"),
        ({}, {"existed_wrappers": {"a": None}}, ConfigListError, "chain"),
    ],
    ids=["method", "ratio", "granularity", "pattern", "group", "init", "chain"],
)
def test_refusals(
    change: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    entry = {"op_types": ["Linear"], "sparse_ratio": RATIO, **change}
    entry = {key: value for key, value in entry.items() if value is not None}
    with pytest.raises(error, match=words):
        SparseTrainingPruner(model, [entry], **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("method", "length", "words"),
    [
        (RigL(), {"max_epochs": 2}, "give max_steps"),
        (RigL(), {"max_steps": 0}, "must be positive"),
        (SET(), {"max_steps": 2}, "give max_epochs"),
        (Gradual(), {}, "give max_steps"),
        (LT(rounds=4), {"max_steps": 4, "max_epochs": 1}, "5 trainings, and there are only 4 steps"),
    ],
)
def test_lengths(method: Any, length: dict[str, int], words: str, batches: Any) -> None:
    model = mlp()
    pruner = SparseTrainingPruner(model, CONFIG, evaluator_of(model, batches), method=method)
    with pytest.raises(ValueError, match=words):
        pruner.compress(**length)


def test_without_an_evaluator_nothing_trains() -> None:
    with pytest.raises(ValueError, match="needs an evaluator"):
        SparseTrainingPruner(mlp(), CONFIG).compress(2, 1)


def test_a_loop_without_steps(batches: Any) -> None:
    model = mlp()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    idle = TorchEvaluator(lambda *args, **kwargs: None, optimizer, training_step)
    with pytest.raises(NothingSearchedError, match="no step"):
        SparseTrainingPruner(model, CONFIG, idle).compress(2, 1)


def test_an_optimizer_of_some_targets(batches: Any) -> None:
    model = mlp()
    some = nni.trace(torch.optim.SGD)([model[1].weight], lr=0.1)
    evaluator = TorchEvaluator(make_evaluator(model, batches).training_func, some, training_step)
    pruner = SparseTrainingPruner(model, CONFIG, evaluator)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigListError, match=r"does not train 3\.weight"):
        pruner.compress(2, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_method_that_needs_losses_is_refused_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = model[0].weight.clone()
    with pytest.raises(ConfigListError, match="the method obd needs losses"):
        SparseTrainingPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], method="obd")
    assert torch.equal(model[0].weight, before)
