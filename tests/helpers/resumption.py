"""An interrupted and resumed search, compared with an uninterrupted one; not a test."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
import torch
from conftest import (
    CONFIG_LIST,
    Batches,
    ConvNet,
    dense_of,
    frozen,
    same,
    training_step,
)
from nni.compression.pruning import AGPPruner
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nni_jackpot import EdgePopup, LotteryJackpotPruner


class Interrupted(BaseException):
    """An interrupt like Ctrl+C."""


class Net(ConvNet):
    """A network with dropout, which shares its random generator with the loader's shuffling."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x) if self.dropout.p else x)


Step = Callable[..., Any]


def plain_step(batch: Any, model: nn.Module) -> Tensor:
    return training_step(batch, model)


def step_of_dicts(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    loss = training_step(batch, model)
    return {"loss": loss, "double": 2 * loss.detach()}


def noisy_step(batch: Any, model: nn.Module) -> Tensor:
    """Draws from all three generators of a process."""
    images, labels = batch
    noise = torch.from_numpy(np.random.randn(*images.shape).astype("float32"))
    return training_step((images + random.random() * 0.1 * noise, labels), model)


class Script:
    """A user's script: a network, a shuffling loader, a search with a checkpoint."""

    def __init__(
        self,
        batches: Batches,
        path: Path | None,
        *,
        step: Step = plain_step,
        dropout: float = 0.0,
        stop_after: int | None = None,
        length: tuple[int | None, int | None] = (20, None),
        agp: bool = False,
        every: int = 3,
        device: str = "cpu",
        config_list: Any = CONFIG_LIST,
        **options: Any,
    ) -> None:
        self.forwards = 0
        self.losses = 0
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = Net(dropout).to(device)
        self.dense = dense_of(self.model)
        images, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
        loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)

        def counted(batch: Any, model: nn.Module) -> Any:
            self.forwards += model.training  # losses are measured again in eval mode
            return step(batch, model)

        def train(model, optimizer, training_step, scheduler, max_steps, max_epochs) -> None:
            model.train()
            steps = 0
            for _ in range(max_epochs or 1000):
                for batch in loader:
                    output = training_step(batch, model)
                    (output["loss"] if isinstance(output, dict) else output).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    self.losses += 1
                    steps += 1
                    if self.losses == stop_after:
                        raise Interrupted
                    if steps == max_steps:
                        return

        optimizer = nni.trace(torch.optim.SGD)(self.model.parameters(), lr=0.1, weight_decay=0.1)
        scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9)
        evaluator = TorchEvaluator(train, optimizer, counted, scheduler)
        self.pruner = LotteryJackpotPruner(
            self.model, config_list, evaluator, **{"method": EdgePopup(lr=5.0), **options}
        )
        if path is not None:
            self.pruner.checkpoint_to(path, every=every)
        driver = AGPPruner(self.pruner, interval_steps=2, total_times=6) if agp else self.pruner
        driver.compress(*length)
        self.masks = self.pruner.get_masks()


def same_buffers(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True))


def check_resumed(batches: Batches, path: Path, stop_after: int, **options: Any) -> Script:
    whole = Script(batches, None, **options)
    with pytest.raises(Interrupted):
        Script(batches, path, stop_after=stop_after, **options)
    resumed = Script(batches, path, **options)
    assert same(resumed.masks, whole.masks)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.pruner.score_parameters(), whole.pruner.score_parameters(), strict=True)
    )
    assert same_buffers(resumed.model, whole.model)  # norm statistics
    assert frozen(resumed.model, resumed.dense, resumed.pruner.tuned)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in resumed.model.named_parameters())
    assert resumed.pruner.learning_rate == whole.pruner.learning_rate
    assert resumed.losses == whole.losses
    assert torch.equal(torch.rand(1), _next_number_after(whole_of=batches, **options))
    assert not path.exists()
    return resumed


def _next_number_after(whole_of: Batches, **options: Any) -> Tensor:
    Script(whole_of, None, **options)
    return torch.rand(1)
