"""Activations and Hessians for criteria and budgets, from the training loop of NNI's evaluator."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures.architecture import _registered
from conftest import Batches, ConvNet, doubles, make_evaluator, training_step
from nni.compression.utils import TorchEvaluator
from test_calibration import Snapshot, sgd
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import CalibrationError, ConfigListError
from nni_jackpot.masking.budgets import by_lamp, by_outliers

CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.7}]


def masks_of(pruner: LotteryJackpotPruner) -> dict[str, Tensor]:
    return {name: targets["weight"].bool() for name, targets in pruner.get_masks().items()}


def started(
    model: nn.Module, batches: list[Any], config: list[dict[str, Any]], init: str = "wanda", **options: Any
) -> LotteryJackpotPruner:
    """Return a pruner whose training loop is the mean square of the output."""
    evaluator = make_evaluator(
        model, [(x, None) for x in batches], lambda batch, m: m(batch[0]).square().mean()
    )
    return LotteryJackpotPruner(model, config, evaluator, init=init, init_batches=len(batches), **options)


def top(importance: Tensor, sparse_ratio: float) -> Tensor:
    keep = importance.numel() - int(sparse_ratio * importance.numel())
    mask = torch.zeros(importance.numel(), dtype=torch.bool)
    mask[importance.flatten().topk(keep).indices] = True
    return mask.view(importance.shape)


@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_initial_masks_by_hand_and_nothing_changes(model: nn.Module, batches: Batches, init: str) -> None:
    """The inputs are those of the dense network in train mode: the batch norms take the batch's statistics."""
    batches, model = doubles(batches), model.double()
    model.train()
    seen: dict[str, list[Tensor]] = {"conv1": [], "conv2": [], "fc": []}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, to=to: to.append(args[0].detach())
        )
        for name, to in seen.items()
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for images, _ in batches[:2]:
            model(images)
    model.load_state_dict(before)
    for handle in handles:
        handle.remove()
    model.eval()
    snapshot = Snapshot(model)
    pruner = LotteryJackpotPruner(model, CONFIG, make_evaluator(model, batches), init=init, init_batches=2)
    found = masks_of(pruner)
    pruner.unwrap_model()
    snapshot.check()
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, inputs in seen.items():
        weight = model.get_submodule(name).weight.detach()
        x = torch.cat(inputs)
        if name != "fc":
            x = F.unfold(x, 3, padding=1).movedim(1, 2).flatten(0, 1)
        rows = weight.flatten(1)
        if init == "wanda":
            importance = rows.abs() * x.norm(dim=0)
        else:
            gram = x.T @ x
            inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
            importance = rows**2 / inverse.diagonal()
        assert torch.equal(found[name], top(importance, 0.7).view(weight.shape)), name


@pytest.mark.honours("budget: owl", "budget: lamp")
def test_budgets_see_the_importance_that_they_need(model: nn.Module, batches: Batches) -> None:
    """Whatever the initial criterion is: OWL sees Wanda's importance, LAMP magnitudes."""
    model.eval()
    counts: dict[str, dict[str, list[int]]] = {}
    for budget in ("owl", "lamp"):
        for init in ("magnitude", "random", "wanda", "grasp"):
            torch.manual_seed(0)
            pruner = LotteryJackpotPruner(
                model, CONFIG, make_evaluator(model, batches), init=init, init_batches=2, budget=budget
            )
            kept = [int(mask.sum()) for mask in masks_of(pruner).values()]
            counts.setdefault(budget, {})[init] = kept
            units = pruner._targets.importance_to_budget
            assert (units is pruner._targets.importance) == (
                init == {"owl": "wanda", "lamp": "magnitude"}[budget]
            )
            pruner.unwrap_model()
        assert len({tuple(kept) for kept in counts[budget].values()}) == 1
    total = sum(n - int(0.7 * n) for n in (72, 864, 36))
    assert sum(counts["owl"]["random"]) == total
    assert sum(counts["lamp"]["random"]) == 972 - int(0.7 * 972)
    assert by_outliers.needs == "wanda"
    assert by_lamp.needs == "magnitude"


def test_masks_given_need_no_evidence(model: nn.Module) -> None:
    masks = LotteryJackpotPruner(model, CONFIG).compress()[1]
    fresh = ConvNet()
    found = LotteryJackpotPruner(fresh, CONFIG, init=masks, budget="owl").get_masks()
    assert all(torch.equal(found[name]["weight"], mask["weight"]) for name, mask in masks.items())


@pytest.mark.parametrize(("option", "name"), [("init", "wanda"), ("init", "sparsegpt"), ("budget", "owl")])
def test_activations_need_an_evaluator(model: nn.Module, option: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='{name}' takes activations through an evaluator"):
        LotteryJackpotPruner(model, CONFIG, **{option: name})


def test_batches_that_count(model: nn.Module, batches: Batches) -> None:
    """An evaluation within the loop does not count, nor do steps beyond the number that was asked for."""

    def train(model: nn.Module, optimizer: Any, training_step: Any, *args: Any) -> None:
        model.train()
        for i, batch in enumerate(batches):
            with torch.no_grad():
                model(100 * batches[-1 - i][0])
            training_step(batch, model).backward()
            optimizer.step()

    seen = []
    for evaluator in (
        TorchEvaluator(train, sgd(model), training_step),
        make_evaluator(model, batches, accumulate=2),
        make_evaluator(model, batches[:2]),
    ):
        pruner = LotteryJackpotPruner(model, CONFIG, evaluator, init="wanda", init_batches=2, norm="freeze")
        seen.append(pruner._targets.importance)
        pruner.unwrap_model()
    for importance in seen[:-1]:
        for a, b in zip(importance.values(), seen[-1].values(), strict=True):
            assert torch.equal(a, b)


class Experts(nn.Module):
    """Two experts, the second of which sees inputs of positive mean only; a layer used twice; keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = self.second(input=x)
        return self.twice(self.twice(self.first(x)))


@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_an_expert_that_no_batch_reaches_is_an_error(init: str) -> None:
    torch.manual_seed(0)
    model, config = Experts(), [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    x = torch.randn(8, 4).abs()
    snapshot = Snapshot(model)
    with pytest.raises(CalibrationError, match=r"do not reach the layer of second\.weight"):
        started(model, [-x], config, init)
    snapshot.check()
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    masks = masks_of(started(model, [-x, x], config, init))
    assert [int(mask.sum()) for mask in masks.values()] == [8, 8, 8]


def test_a_layer_used_twice_sees_all_its_inputs() -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), -torch.randn(8, 4).double().abs()
    hidden = model.first(x).detach()
    inputs = torch.cat([hidden, model.twice(hidden).detach()])
    importance = model.twice.weight.detach().abs() * inputs.norm(dim=0)
    config = [{"op_names": ["twice"], "sparse_ratio": 0.5}]
    assert torch.equal(masks_of(started(model, [x], config))["twice"], top(importance, 0.5))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"op_types": ["BatchNorm2d"]}, "'weight' of a BatchNorm2d"),
        ({"op_names": ["fc"], "target_settings": {"bias": {"sparse_ratio": 0.5}}}, "'bias' of a Linear"),
    ],
)
def test_parameters_that_multiply_no_input_are_refused(
    model: nn.Module, batches: Batches, entry: dict[str, Any], words: str
) -> None:
    calls: list[float] = []
    evaluator = make_evaluator(model, batches, log=calls)
    with pytest.raises(ConfigListError, match=f"{words}, and only weights of Linear, Conv1d"):
        LotteryJackpotPruner(model, [{"sparse_ratio": 0.5, **entry}], evaluator, init="wanda")
    assert not calls


def gpt2(tied: bool) -> nn.Module:
    sizes = {"vocab_size": 67, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def words_of(seed: int) -> Tensor:
    return torch.randint(3, 67, (3, 9), generator=torch.Generator().manual_seed(seed))


def language_evaluator(model: nn.Module) -> TorchEvaluator:
    batches = [words_of(seed) for seed in range(2)]
    return make_evaluator(model, batches, lambda batch, m: m(input_ids=batch, labels=batch).loss)


@pytest.mark.parametrize("init", ["wanda", "sparsegpt", "taylor", "obd"])
def test_all_criteria_see_gpt2_with_its_transposed_weights(init: str) -> None:
    torch.manual_seed(0)
    model = gpt2(tied=True)
    with _registered(("Conv1D",)):
        config = [{"op_types": ["Conv1D"], "sparse_pattern": "2:4"}]
        pruner = LotteryJackpotPruner(model, config, language_evaluator(model), init=init, init_batches=2)
        masks = masks_of(pruner)
        pruner.unwrap_model()
        assert len(masks) == 8
        for mask in masks.values():  # inputs run along the first dimension
            assert (mask.t().reshape(-1, 4).sum(1) == 2).all()
        channels = [{"op_types": ["Conv1D"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
        pruner = LotteryJackpotPruner(model, channels, language_evaluator(model), init=init)
        for mask in masks_of(pruner).values():
            assert (mask == mask[:1]).all()
            assert mask[0].sum() == mask.shape[1] // 2


def test_a_weight_that_is_an_embedding_too_is_refused() -> None:
    model = gpt2(tied=True)
    config = [{"op_names": ["lm_head"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigListError, match="'weight' of a Embedding"):
        LotteryJackpotPruner(model, config, language_evaluator(model), init="wanda")


def test_a_weight_that_is_read_without_its_layer_is_an_error() -> None:
    """`nn.MultiheadAttention` never calls its output projection."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    config = [{"op_types": ["NonDynamicallyQuantizableLinear"], "sparse_ratio": 0.5}]
    with _registered(("NonDynamicallyQuantizableLinear",)):
        with pytest.raises(CalibrationError, match="its weight is read without a call of the layer"):
            started(model, [torch.randn(2, 5, 8)], config)
        LotteryJackpotPruner(model, config)


@pytest.mark.parametrize("init", ["wanda", "sparsegpt", "taylor", "obd"])
@pytest.mark.parametrize(
    "more",
    [{"granularity": "out_channel"}, {"granularity": [4, 2, 1, 1]}, {"internal_metric_block": 12}],
    ids=str,
)
def test_grains_keep_their_numbers(
    model: nn.Module, batches: Batches, init: str, more: dict[str, Any]
) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, **more}]
    mask = masks_of(LotteryJackpotPruner(model, config, make_evaluator(model, batches), init=init))["conv2"]
    assert mask.sum() == 864 // 2
    if "internal_metric_block" in more:
        assert (mask.flatten(1).sum(1) == 36).all()
    else:
        height, width = (1, 8) if more["granularity"] == "out_channel" else (4, 2)
        blocks = mask.unfold(0, height, height).unfold(1, width, width).flatten(-2)
        assert (blocks == blocks[..., :1]).all()


def _rank(rank: int, folder: Path, batches: Batches) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {}
        for init in ("wanda", "sparsegpt"):
            torch.manual_seed(0)
            model = nn.parallel.DistributedDataParallel(ConvNet().double())
            options = {"init": init, "init_batches": 2, "norm": "freeze"}
            pruner = LotteryJackpotPruner(model, CONFIG, make_evaluator(model, batches[rank::2]), **options)
            found[init] = {name.removeprefix("module."): mask for name, mask in masks_of(pruner).items()}
            pruner.unwrap_model()
        torch.save(found, folder / f"{rank}.pt")
    finally:
        gc.collect()  # wrapped models are cycles, and must not outlive the process group that they hold
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="PyTorch without torch.distributed")
def test_all_ranks_start_from_the_inputs_of_all_batches(batches: Batches, tmp_path: Path) -> None:
    batches = doubles(batches)
    torch.multiprocessing.spawn(_rank, (tmp_path, batches), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for init, masks in ranks[0].items():
        torch.manual_seed(0)
        model = ConvNet().double()
        options = {"init": init, "init_batches": 4, "norm": "freeze"}
        alone = masks_of(LotteryJackpotPruner(model, CONFIG, make_evaluator(model, batches), **options))
        for name, mask in masks.items():
            assert torch.equal(mask, ranks[1][init][name])
            assert torch.equal(mask, alone[name])
