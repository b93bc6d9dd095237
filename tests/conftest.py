"""Models, training loops and folders of runs that the tests share."""

from __future__ import annotations

import os

# A thread for each of the processes that share the tests, and for what these start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import triton_interpreter  # isort: skip  # noqa: F401  # has to be told before Triton is loaded, by whomever

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import nni
import pytest
import report_runs
import torch
from nni.compression.utils import LightningEvaluator, TorchEvaluator
from report_runs import Measures, Write
from tiny_runs import write_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nni_jackpot import EdgePopup, LotteryJackpotPruner, mask_overlap
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.models import build_model

TESTS = Path(__file__).parent
ROOT, HELPERS = TESTS.parent, TESTS / "helpers"

# PyTorch has no variable for it; what the tests start hears of it by a folder on its path.
if os.environ.get("JACKPOT_TEST_MKLDNN") == "0":
    torch.backends.mkldnn.set_flags(False)
    folders = [str(TESTS / "without_mkldnn"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


class ConvNet(nn.Module):
    """Convolutions with and without bias, batch norm and a classifier, on 1x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


Batches = list[tuple[Tensor, Tensor]]


def honours(feature: str, *values: Any) -> Any:
    """Return a case of a parametrized test with its own mark (see support_table.py)."""
    return pytest.param(*values, marks=pytest.mark.honours(feature))


def refuses(feature: str, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.refuses(feature))


CONFIG_LIST: list[dict[str, Any]] = [
    {"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["fc"], "sparse_ratio": 0.7}
]
# The same of a network within a LightningModule.
NET_ONLY = [{**CONFIG_LIST[0], "exclude_op_names": ["net.fc"]}]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture
def batches() -> Batches:
    """Six batches of a task that can be learned: a bright row, a bright column, or neither."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(6):
        labels = torch.randint(3, (16,), generator=generator)
        images = torch.randn(16, 1, 8, 8, generator=generator) * 0.3
        for image, label in zip(images, labels, strict=True):
            if label < 2:
                (image[0] if label else image[0].T)[3] += 2.0
        result.append((images, labels))
    return result


def doubles(batches: Batches) -> Batches:
    """Return batches in double precision.

    There, two ways to one sum differ by 1e-16 of it, and scores that lie as near to each other are equal on
    purpose: masks found in either way are the same.
    """
    return [(images.double(), labels) for images, labels in batches]


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def make_evaluator(
    model: nn.Module,
    batches: Batches,
    step: Callable[..., Tensor] = training_step,
    log: list[float] | None = None,
    accumulate: int = 1,
) -> TorchEvaluator:
    """Return an evaluator whose loop runs over the batches and counts its calls in ``log``."""

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        steps = 0
        for _ in range(max_epochs or 1000):
            for i, batch in enumerate(batches):
                loss = training_step(batch, model)
                loss.backward()
                if log is not None:
                    log.append(loss.item())
                if (i + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
                if max_steps is not None and steps >= max_steps:
                    return

    # Weight decay would change a weight that is not frozen, gradient or not.
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1, weight_decay=0.1)
    return TorchEvaluator(train, optimizer, step)


class Allocations(TorchDispatchMode):
    """Notes the most bytes of any tensor that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(alias.alias_info is not None for alias in function._schema.returns)
        if isinstance(result, Tensor) and not is_view:
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def lightning_trainer(**options: Any) -> Any:
    """Return a traced trainer of Lightning that clips gradients, unless told not to, and keeps quiet."""
    lightning = pytest.importorskip("pytorch_lightning")
    return nni.trace(lightning.Trainer)(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"gradient_clip_val": 1.0, **options},
    )


def lightning_evaluator(net: nn.Module, batches: Batches, manual: bool = False, **options: Any) -> Any:
    """Return a module of Lightning around a network, and an evaluator that trains it."""
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = training_step(batch, self)
            if manual:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            sgd = nni.trace(torch.optim.SGD)
            optimizers = [sgd(self.parameters(), lr=0.1, weight_decay=0.1)]
            if manual:
                optimizers.append(sgd(self.net.fc.parameters(), lr=0.1))
            return optimizers, [nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizers[0], 0.9)]

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

    trainer = lightning_trainer(**{"gradient_clip_val": None if manual else 1.0, **options})
    return Module(), LightningEvaluator(trainer, nni.trace(Data)())


def dense_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def frozen(model: nn.Module, dense: dict[str, Tensor], tuned: Collection[str] = ()) -> bool:
    """Return True if every parameter of a model, wrapped or not, is bit for bit unchanged, or else tuned."""
    now = {n.replace("_nni_wrapper.", ""): p for n, p in model.named_parameters() if not n.endswith("_score")}
    return now.keys() == dense.keys() and all(
        torch.equal(now[name], value) for name, value in dense.items() if name not in tuned
    )


def zeros(pruner: LotteryJackpotPruner) -> dict[str, int]:
    return {name: int((mask["weight"] == 0).sum()) for name, mask in pruner.get_masks().items()}


def same(masks_a: dict, masks_b: dict) -> bool:
    return mask_overlap(masks_a, masks_b).total == 1.0


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return True if two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def expected_zeros(model: nn.Module, ratio: float = 0.7) -> dict[str, int]:
    return {name: int(ratio * getattr(model, name).weight.numel()) for name in ("conv1", "conv2")}


def search(
    batches: Batches, seed: int = 0, steps: int | None = 24, epochs: int | None = None, **options: Any
) -> tuple:
    torch.manual_seed(0)
    model = ConvNet()
    dense = dense_of(model)
    torch.manual_seed(seed)
    log: list[float] = []
    pruner = LotteryJackpotPruner(
        model,
        CONFIG_LIST,
        make_evaluator(model, batches, log=log),
        **{"method": EdgePopup(lr=2.0), **options},
    )
    start = pruner.get_masks()
    wrapped, masks = pruner.compress(steps, epochs)
    assert wrapped is model
    assert frozen(model, dense)
    return pruner, start, masks, log


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """Write the folder of a finished run under ``runs``."""
    return partial(report_runs.write_run, tmp_path / "runs")


@pytest.fixture
def measures(tmp_path: Path) -> Measures:
    """Read what has been measured there."""
    return partial(report_runs.measures_of, tmp_path / "runs")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run on digits that takes a second or two."""
    return write_file(
        tmp_path,
        data={"train_images": None},
        model={"width": 6},
        pretrain={"epochs": 3, "cache": str(tmp_path / "pretrained")},
        search={"checkpoint_every": 500},
        finetune={"under": "initial"},
    )


@pytest.fixture
def config(config_file: Path) -> RunConfig:
    return load_config(config_file)


def model_of(config: RunConfig) -> nn.Module:
    """Return the network of a run on digits, its weights just drawn."""
    return build_model(config.model, num_classes=10, in_channels=1)
