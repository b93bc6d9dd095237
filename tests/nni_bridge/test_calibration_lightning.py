"""Losses of Lightning's training step, over a few batches."""

from __future__ import annotations

from typing import Any

import nni
import pytest
import torch
from conftest import Batches, ConvNet, lightning_trainer, training_step
from nni.compression.utils import LightningEvaluator
from test_calibration import Snapshot, seen_by, wrap
from torch import Tensor, nn


@pytest.mark.parametrize("fails", [False, True])
def test_lightning(batches: Batches, fails: bool) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()
            self.shift = nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:
            if fails and index == 1:
                raise KeyError("mine")
            return {"loss": training_step((batch[0] + self.shift, batch[1]), self.net)}

        def configure_optimizers(self) -> Any:
            optimizer = nni.trace(torch.optim.AdamW)(self.parameters(), lr=0.1)
            return [optimizer], [nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1)]

    class Data(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            dataset = torch.utils.data.TensorDataset(images, labels)
            return torch.utils.data.DataLoader(dataset, 16, shuffle=True)

    trainer = lightning_trainer(max_epochs=2, accumulate_grad_batches=2)
    model = Module()
    evaluator = LightningEvaluator(trainer, nni.trace(Data)())
    losses, _ = wrap(model, evaluator)
    snapshot = Snapshot(model)
    if fails:
        with pytest.raises(KeyError, match="mine"):
            seen_by(losses)
    else:
        seen = seen_by(losses)
        assert len(set(seen)) == 3
        assert seen_by(losses) == seen
    snapshot.check()
    assert model._trainer is None
    assert evaluator.model is None
