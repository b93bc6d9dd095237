"""Every evaluator of NNI, and the ways in which a loop may step: mixed precision, clipping, several optimizers."""

from __future__ import annotations

import gc
import socket
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from conftest import CONFIG_LIST, Batches, dense_of, frozen, lightning_trainer, training_step
from nni.compression.utils import LightningEvaluator, TorchEvaluator, TransformersEvaluator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nni_jackpot import LotteryJackpotPruner


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


def test_gradient_scaler_clipping_and_two_optimizers(model: nn.Module, batches: Batches) -> None:
    scores: list[float] = []

    def train(model, optimizers, training_step, schedulers, max_steps, max_epochs) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(max_steps):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = training_step(batches[step % len(batches)], model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizers[0])
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scores.append(norm.item())
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
    check_search(LotteryJackpotPruner(model, CONFIG_LIST, evaluator, lr=2.0), dense, max_steps=12)
    # What was clipped was the scores' own gradient: a scaled one would be a thousand times as long.
    assert 0 < max(scores) < 50


# -- Lightning


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_epochs": 2}])
def test_lightning(
    model: nn.Module, batches: Batches, precision: str, length: dict[str, int], tmp_path: Path
) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return training_step(batch, self)

        def configure_optimizers(self) -> Any:
            optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1, weight_decay=0.1)
            return [optimizer], [nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9)]

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

    trainer = lightning_trainer(precision=precision, default_root_dir=str(tmp_path))
    module = Module()
    dense = dense_of(module)
    config_list = [{**CONFIG_LIST[0], "exclude_op_names": ["net.fc"]}]
    pruner = LotteryJackpotPruner(
        module, config_list, LightningEvaluator(trainer, nni.trace(Data)()), init="snip", lr=5.0
    )
    check_search(pruner, dense, **length)
    assert pruner._clock.step == 12
    # Half a cosine over 12 steps, which the trainer has told where epochs were given.
    last = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 11 / 12)).item())
    assert pruner.learning_rate == pytest.approx(5.0 * last)


# -- Transformers


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_epochs": 2}])
def test_transformers(length: dict[str, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_labels=2, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)
    dense = dense_of(model)
    rows = [{"input_ids": torch.randint(1, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.1,
    )
    evaluator = TransformersEvaluator(nni.trace(transformers.Trainer)(model, arguments, train_dataset=rows))
    config_list = [{"op_types": ["Linear"], "exclude_op_names": ["classifier"], "sparse_ratio": 0.7}]
    pruner = LotteryJackpotPruner(model, config_list, evaluator, lr=50.0)
    check_search(pruner, dense, **length)
    assert pruner._clock.step == 6


# -- two processes


def _search_of_rank(rank: int, world: int, batches: Batches) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    wrapped = DistributedDataParallel(model) if world > 1 else model
    prefix = "module." if world > 1 else ""

    def train(model, optimizer, training_step, scheduler, max_steps, max_epochs) -> None:
        for step in range(max_steps):
            images, labels = batches[step % len(batches)]
            part = slice(rank, None, world)
            training_step((images[part], labels[part]), model).backward()
            optimizer.step()
            optimizer.zero_grad()

    def step(batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(wrapped.parameters(), lr=0.1), step)
    config_list = [{"op_names": [f"{prefix}1"], "sparse_ratio": 0.7}]
    pruner = LotteryJackpotPruner(wrapped, config_list, evaluator, init="snip", lr=1.0)
    start = pruner.get_masks()
    masks = pruner.compress(12, None)[1]
    return [start[f"{prefix}1"]["weight"], masks[f"{prefix}1"]["weight"]]


def _rank(rank: int, world: int, port: int, batches: Batches, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.save(_search_of_rank(rank, world, batches), f"{folder}/{world}-{rank}.pt")
    gc.collect()  # wrapped models are cycles, and must not outlive the process group that they hold
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(batches: Batches, tmp_path: Path) -> None:
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_rank, (world, port, batches, str(tmp_path)), nprocs=world)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(one[0], one[1])
    assert (first[1] == one[1]).float().mean() > 0.999
