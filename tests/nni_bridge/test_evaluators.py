"""NNI's evaluators, with mixed precision, gradient clipping and several optimizers."""

from __future__ import annotations

import contextlib
import gc
import socket
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from conftest import (
    CONFIG_LIST,
    NET_ONLY,
    Batches,
    ConvNet,
    dense_of,
    doubles,
    frozen,
    lightning_evaluator,
    make_evaluator,
    same,
    training_step,
)
from nni.compression.utils import TorchEvaluator, TransformersEvaluator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.search.clock import cosine


def check_search(pruner: LotteryJackpotPruner, dense: dict[str, Tensor], **length: Any) -> None:
    start = pruner.get_masks()
    pruner.compress(**{"max_steps": None, "max_epochs": None, **length})
    moved = 0
    for module, targets in pruner.get_masks().items():
        found, ratio = targets["weight"], CONFIG_LIST[0]["sparse_ratio"]
        assert int((found == 0).sum()) == int(ratio * found.numel())
        moved += int((found != start[module]["weight"]).sum())
    assert moved
    assert frozen(pruner.bound_model, dense)
    pruner.unwrap_model()
    assert frozen(pruner.bound_model, dense)


# -- PyTorch


@pytest.mark.honours(
    "TorchEvaluator", "mixed precision", "gradient clipping", "several optimizers", "learning rate schedulers"
)
def test_gradient_scaler_clipping_and_two_optimizers(model: nn.Module, batches: Batches) -> None:
    norms: list[tuple[float, float]] = []

    def train(model, optimizers, training_step, schedulers, max_steps, max_epochs) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(max_steps):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = training_step(batches[step % len(batches)], model)
            scores = [p for p in model.parameters() if p.requires_grad]
            plain = nn.utils.get_total_norm(torch.autograd.grad(loss, scores, retain_graph=True))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizers[0])
            clipped = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norms.append((clipped.item(), plain.item()))
            scaler.step(optimizers[0])
            scaler.update()
            optimizers[1].step()
            schedulers[0].step()

    optimizers = [
        nni.trace(torch.optim.SGD)(model.fc.parameters(), lr=0.1, weight_decay=0.1),
        nni.trace(torch.optim.Adam)(model.conv1.parameters(), lr=0.1),
    ]
    scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizers[0], 0.9)
    evaluator = TorchEvaluator(train, optimizers, training_step, [scheduler])
    dense = dense_of(model)
    check_search(
        LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup(lr=2.0)), dense, max_steps=12
    )
    # The unscaled gradient of the scores was clipped: a scaled gradient is a thousand times longer.
    assert len(norms) == 12
    assert all(clipped == pytest.approx(plain) for clipped, plain in norms)


# -- Lightning


@pytest.mark.honours("LightningEvaluator", "max_steps", "max_epochs", "mixed precision")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_epochs": 2}])
def test_lightning(
    model: nn.Module, batches: Batches, precision: str, length: dict[str, int], tmp_path: Path
) -> None:
    module, evaluator = lightning_evaluator(
        model, batches, precision=precision, default_root_dir=str(tmp_path)
    )
    dense = dense_of(module)
    pruner = LotteryJackpotPruner(module, NET_ONLY, evaluator, init="snip", method=EdgePopup(lr=5.0))
    check_search(pruner, dense, **length)
    assert pruner._search.clock.step == 12
    # Half a cosine over 12 steps; if epochs were given, the trainer provides the number.
    last = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 11 / 12)).item())
    assert pruner.learning_rate == pytest.approx(5.0 * last)


# -- where gradients are computed inside the step, or scaled until it


def plain_search(net: nn.Module, batches: Batches, clip: float | None) -> dict[str, Tensor]:
    """Search as Sec. 4.1 says, 12 steps in a plain loop; return the weights' masks."""
    pruner = LotteryJackpotPruner(net, CONFIG_LIST)
    scores = pruner.score_parameters()
    optimizer = torch.optim.SGD(scores, lr=5.0, momentum=0.9, weight_decay=5e-4)
    net.train()
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 5.0 * cosine(step / 12)
        training_step(batches[step % len(batches)], net).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(scores, clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: masks["weight"] for name, masks in pruner.get_masks().items()}


def check_equals_plain_search(
    pruner: LotteryJackpotPruner, batches: Batches, clip: float | None, **length: Any
) -> None:
    """Check the masks that a search finds; network and batches are in double precision."""
    expected = plain_search(fresh_net().double(), batches, clip)
    pruner.compress(**{"max_steps": None, "max_epochs": None, **length})
    found = {name.removeprefix("net."): masks["weight"] for name, masks in pruner.get_masks().items()}
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


def fresh_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


@pytest.mark.honours("LightningEvaluator")
@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_epochs": 2}])
def test_lightning_search_is_sgd_of_section_4_1(
    model: nn.Module, batches: Batches, length: dict[str, int], tmp_path: Path
) -> None:
    batches = doubles(batches)
    module, evaluator = lightning_evaluator(model.double(), batches, default_root_dir=str(tmp_path))
    pruner = LotteryJackpotPruner(module, NET_ONLY, evaluator, method=EdgePopup.paper(lr=5.0))
    check_equals_plain_search(pruner, batches, 1.0, **length)


@pytest.mark.honours("LightningEvaluator", "several optimizers")
@pytest.mark.parametrize(
    "length", [{"max_steps": 24}, {"max_epochs": 2}]
)  # Lightning counts both optimizers'
def test_lightning_with_manual_optimization(
    model: nn.Module, batches: Batches, length: dict[str, int], tmp_path: Path
) -> None:
    batches, folder = doubles(batches), str(tmp_path)
    module, evaluator = lightning_evaluator(model.double(), batches, manual=True, default_root_dir=folder)
    pruner = LotteryJackpotPruner(module, NET_ONLY, evaluator, method=EdgePopup.paper(lr=5.0))
    check_equals_plain_search(pruner, batches, None, **length)


@pytest.mark.honours("TorchEvaluator")
def test_a_closure_is_searched_after_its_backward(model: nn.Module, batches: Batches) -> None:
    batches = doubles(batches)

    def train(model, optimizer, training_step, scheduler, max_steps, max_epochs) -> None:
        for step in range(max_steps):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = training_step(batches[step % len(batches)], model)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0

    optimizer = nni.trace(torch.optim.SGD)(model.double().parameters(), lr=0.1, weight_decay=0.1)
    evaluator = TorchEvaluator(train, optimizer, training_step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, method=EdgePopup.paper(lr=5.0))
    check_equals_plain_search(pruner, batches, None, max_steps=12)


@pytest.mark.honours("TorchEvaluator", "mixed precision")
def test_a_fused_optimizer_leaves_unscaling_to_the_search(model: nn.Module, batches: Batches) -> None:
    overflows = []

    def train(model, optimizer, training_step, scheduler, max_steps, max_epochs) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))  # the first step is skipped
        step = 0
        while step < max_steps:
            scaler.scale(training_step(batches[step % len(batches)], model)).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update(2.0**10 if before == float("inf") else None)
            optimizer.zero_grad()
            overflows.append(before == float("inf"))
            step += not overflows[-1]

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    # The skipped step changes norm statistics.
    options: dict[str, Any] = {"method": EdgePopup.paper(lr=5.0), "norm": "freeze"}
    evaluator = TorchEvaluator(train, optimizer, training_step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, **options)
    plain = fresh_net()
    expected = LotteryJackpotPruner(plain, CONFIG_LIST, make_evaluator(plain, batches), **options)
    pruner.compress(12, None)
    assert overflows == [True] + 12 * [False]
    assert pruner._search.clock.step == 12
    assert same(pruner.get_masks(), expected.compress(12, None)[1])
    scores = zip(pruner.score_parameters(), expected.score_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in scores)  # a power of two is exact


# -- Transformers


def bert_pruner(folder: Path) -> LotteryJackpotPruner:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_labels=2, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(1, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.1,
    )
    evaluator = TransformersEvaluator(nni.trace(transformers.Trainer)(model, arguments, train_dataset=rows))
    config_list = [{"op_types": ["Linear"], "exclude_op_names": ["classifier"], "sparse_ratio": 0.7}]
    return LotteryJackpotPruner(model, config_list, evaluator, method=EdgePopup(lr=50.0))


@pytest.mark.honours("TransformersEvaluator", "max_steps", "max_epochs")
@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_epochs": 2}])
def test_transformers(length: dict[str, int], tmp_path: Path) -> None:
    pruner = bert_pruner(tmp_path)
    pruner.unwrap_model()
    dense = dense_of(pruner.bound_model)
    pruner.wrap_model()
    check_search(pruner, dense, **length)
    assert pruner._search.clock.step == 6


@pytest.mark.honours("TransformersEvaluator", "resume")
def test_transformers_resume(tmp_path: Path) -> None:
    whole = bert_pruner(tmp_path).compress(None, 2)[1]
    pruner = bert_pruner(tmp_path)
    pruner.checkpoint_to(tmp_path / "search.pth", every=2)
    forwards = iter(range(100))

    def stop(*_: Any) -> None:
        if next(forwards) == 4:
            raise KeyboardInterrupt

    handle = pruner.bound_model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pruner.compress(None, 2)
    handle.remove()
    again = bert_pruner(tmp_path)
    again.checkpoint_to(tmp_path / "search.pth")
    assert same(again.compress(None, 2)[1], whole)
    assert again.resumed_step == 4


# -- two processes


def _search_of_rank(
    rank: int, world: int, batches: Batches, path: Path | None = None, stop_at: int | None = None
) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    prefix = "module." if world > 1 else ""

    def train(model, optimizer, training_step, scheduler, max_steps, max_epochs) -> None:
        if world > 1:  # large state that is equal in all processes is not sent
            sent = {name for name, _ in model.module.named_buffers()} - model.parameters_to_ignore
            assert not {name for name in sent if "weight" in name}
        for step in range(max_steps):
            if step == stop_at:
                raise KeyboardInterrupt
            images, labels = batches[step % len(batches)]
            part = slice(rank, None, world)
            training_step((images[part], labels[part]), model).backward()
            optimizer.step()
            optimizer.zero_grad()

    def step(batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(wrapped.parameters(), lr=0.1), step)
    config_list = [{"op_names": [f"{prefix}1"], "sparse_ratio": 0.7}]
    pruner = LotteryJackpotPruner(wrapped, config_list, evaluator, init="snip", method=EdgePopup(lr=1.0))
    if path is not None:
        pruner.checkpoint_to(path, every=4)
    start = pruner.get_masks()
    masks = pruner.compress(12, None)[1]
    assert pruner.resumed_step == (4 if path else 0)
    return [start[f"{prefix}1"]["weight"], masks[f"{prefix}1"]["weight"]]


def _rank(rank: int, world: int, port: int, batches: Batches, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    found = _search_of_rank(rank, world, batches)
    with contextlib.suppress(KeyboardInterrupt):
        _search_of_rank(rank, world, batches, Path(folder, "search.pth"), stop_at=7)
    torch.distributed.barrier()
    resumed = _search_of_rank(rank, world, batches, Path(folder, "search.pth"))
    assert torch.equal(found[1], resumed[1])
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    gc.collect()  # wrapped models contain cycles, and must not outlive the process group that they hold
    torch.distributed.destroy_process_group()


@pytest.mark.honours("DistributedDataParallel", "resume")
def test_two_processes_find_what_one_finds(batches: Batches, tmp_path: Path) -> None:
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_rank, (world, port, doubles(batches), str(tmp_path)), nprocs=world)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(one[0], one[1])
    assert torch.equal(first[0], one[0])
    assert torch.equal(first[1], one[1])
