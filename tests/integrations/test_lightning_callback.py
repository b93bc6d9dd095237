"""A plain ``pytorch_lightning.Trainer`` searches a jackpot by a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ConvNet, same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import CheckpointError, NothingSearchedError

lightning = pytest.importorskip("pytorch_lightning")

from nni_jackpot.integrations.lightning import JackpotCallback  # noqa: E402

CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
LR = 0.05
EPOCHS = 2


class Module(lightning.LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = ConvNet()
        self._count = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.5) for _ in range(self._count)]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(48) % 3), batch_size=8)


def trainer_of(folder: Path, callback: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], **quiet, **options
    )


def search(module: Any, folder: Path, resume: str | None = None, **options: Any) -> tuple[Any, Any, Any]:
    pruner = LotteryJackpotPruner(module.network, CONV, method=EdgePopup(lr=LR))
    callback = JackpotCallback(pruner)
    trainer = trainer_of(folder, callback, **options)
    trainer.fit(module, loader(), ckpt_path=resume)
    return pruner, callback, trainer


def own_masks(accumulated: int) -> Any:
    network: nn.Module = Module().network
    pruner = LotteryJackpotPruner(network, CONV, method=EdgePopup(lr=LR))
    batches = [*loader()] * EPOCHS
    loop = pruner.begin(total_steps=len(batches) // accumulated)
    network.train()
    for number, (images, labels) in enumerate(batches):
        (F.cross_entropy(network(images), labels) / accumulated).backward()
        if (number + 1) % accumulated == 0:
            loop.step()
    return loop.finish()


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_masks_are_those_of_a_loop_of_your_own(accumulated: int, tmp_path: Path) -> None:
    module = Module()
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    pruner, callback, _ = search(module, tmp_path, accumulate_grad_batches=accumulated)
    pruner.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in module.network.named_parameters())
    assert same(callback.masks, own_masks(accumulated))


def test_a_search_resumes_from_the_trainer_s_checkpoint(tmp_path: Path) -> None:
    whole = search(Module(), tmp_path)[1].masks

    class Saving(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")

    module = Module()
    pruner = LotteryJackpotPruner(module.network, CONV, method=EdgePopup(lr=LR))
    trainer = trainer_of(tmp_path, JackpotCallback(pruner))
    trainer.callbacks.append(Saving())
    trainer.fit(module, loader())
    resumed = search(Module(), tmp_path, str(tmp_path / "six.ckpt"))[1].masks
    assert same(resumed, whole)


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    with pytest.raises(NothingSearchedError, match="automatic optimization by one optimizer"):
        search(Module(optimizers=2), tmp_path)

    class Head(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(NothingSearchedError, match=r"does not hold the scores: .* take self\.parameters"):
        search(Head(), tmp_path)


def test_a_checkpoint_without_a_search(tmp_path: Path) -> None:
    module = Module()
    pruner = LotteryJackpotPruner(module.network, CONV, method=EdgePopup(lr=LR))
    callback = JackpotCallback(pruner)
    trainer_of(tmp_path, callback)
    callback.load_state_dict({})
    callback._search = pruner.begin(4)
    with pytest.raises(CheckpointError, match="the checkpoint has no search, or another one"):
        callback._resume(2)
