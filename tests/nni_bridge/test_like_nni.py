"""The requirements of NNI's test suite for pruners, on one model, plain and as a LightningModule.

Counterparts of test_pruner.py and test_fusion_compress.py in NNI's test/algo/compression. Here zeros are
counted before every step, and the sped-up model must compute what the masked one computes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from conftest import Batches, dense_of, frozen, honours, lightning_trainer, make_evaluator, training_step
from nni.compression.distillation import Adaptive1dLayerwiseDistiller
from nni.compression.pruning import AGPPruner, LinearPruner
from nni.compression.quantization import LsqQuantizer, QATQuantizer
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import Evaluator, LightningEvaluator, auto_set_denpendency_group_ids
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
WIDTHS = {"stem": 16, "left": 8, "right": 8, "top": 8, "hidden": 12}
CHANNELS = ("channels", "dependent")
OPTIONS: dict[str, Any] = {"method": EdgePopup.paper(lr=50.0), "init": "random", "norm": "freeze"}
# A scheduled pruner raises its sparsity four times, every two steps; two epochs have twelve steps.
RAISED = [min(step // 2, 4) / 4 for step in range(12)]
CUBIC = [1 - (1 - raised) ** 3 for raised in RAISED]
# The driver of the search, its steps or epochs, and the share of the final sparsity before every step.
RUNS: dict[str, tuple[Any, int | None, int | None, list[float]]] = {
    "steps": (None, 12, None, 12 * [1.0]),
    "epochs": (None, None, 2, 12 * [1.0]),
    "linear": (LinearPruner, 12, None, RAISED),
    "agp": (AGPPruner, 12, None, CUBIC),
    "agp epochs": (AGPPruner, None, 2, CUBIC),
}
SEARCHES = {
    "weights": ["epochs", "agp epochs"],
    "global": ["steps", "linear"],
    "channels": ["steps", "agp epochs"],
    "dependent": ["epochs", "linear"],
}
# The features in docs/support.md, for a search and its driver.
FEATURES = {
    "weights": [],
    "global": ["global_group_id", "max_sparse_ratio"],
    "channels": ["granularity: out_channel", "target_names: bias, that follows its weight", "ModelSpeedup"],
    "dependent": [
        *("dependency_group_id", "internal_metric_block", "align"),
        *("auto_set_denpendency_group_ids", "ModelSpeedup"),
    ],
    "steps": ["max_steps"],
    "epochs": ["max_epochs"],
    "linear": ["LinearPruner"],
    "agp epochs": ["AGPPruner"],
}
both_kinds = pytest.mark.parametrize(
    "kind", [honours("TorchEvaluator", "torch"), honours("LightningEvaluator", "lightning")]
)


class Branches(nn.Module):
    """Two branches, one of them grouped, whose sum ties their channels together; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3)
        self.stem_norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 8, 3, groups=2)
        self.left_norm = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(16, 8, 3)
        self.right_norm = nn.BatchNorm2d(8)
        self.top = nn.Conv2d(8, 8, 3)
        self.hidden = nn.Linear(32, 12)
        self.head = nn.Linear(12, 3)
        for layer in self.children():
            nn.init.normal_(layer.bias, std=0.1)  # the bias of a removed channel must not be left
            layer.weight.data *= 2  # so that outputs of the dense and the masked model differ

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = (self.left_norm(self.left(x)) + self.right_norm(self.right(x))).relu()
        x = self.top(x).relu().flatten(1)
        return self.head(self.hidden(x).relu())


def make(kind: str, batches: Batches, folder: Path) -> tuple[Any, Evaluator, str]:
    """Return the model, its evaluator, and the prefix of its layers' names."""
    torch.manual_seed(0)
    net = Branches()
    if kind == "torch":
        return net, make_evaluator(net, batches), ""
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return training_step(batch, self)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1, weight_decay=0.1)
            scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

    trainer = lightning_trainer(default_root_dir=str(folder))
    return Module(), LightningEvaluator(trainer, nni.trace(Data)(), dummy_input=X), "model."


def configs(wish: str, model: nn.Module, prefix: str) -> list[dict[str, Any]]:
    names = [prefix + name for name in WIDTHS]
    if wish not in CHANNELS:
        bounds = {"global_group_id": 0, "max_sparse_ratio": 0.9} if wish == "global" else {}
        return [{"op_names": names, "sparse_ratio": 0.5, **bounds}]
    channels = {"sparse_ratio": 0.5, "granularity": "out_channel"}
    if wish == "channels":  # layers that share channels with no other layer
        return [{"op_names": names[3:], **channels}]
    result: list[dict[str, Any]] = [{"op_names": names, **channels}]
    for name in names[:3]:
        follow = {"align": {"module_name": name, "target_name": "weight", "dims": [0]}}
        result.append({"op_names": [name + "_norm"], "target_settings": {"weight": follow, "bias": follow}})
    return auto_set_denpendency_group_ids(model, result, X)


def masks_of(pruner: LotteryJackpotPruner) -> dict[str, dict[str, Any]]:
    return {name.removeprefix("model."): targets for name, targets in pruner.get_masks().items()}


def zeros_of(pruner: LotteryJackpotPruner) -> dict[str, int]:
    return {n: int((m["weight"] == 0).sum()) for n, m in masks_of(pruner).items() if n in WIDTHS}


def expected_zeros(wish: str, ratio: float) -> dict[str, int]:
    result, net = {}, Branches()
    for name in list(WIDTHS)[3:] if wish == "channels" else WIDTHS:
        numel = net.get_submodule(name).weight.numel()
        grains = WIDTHS[name] if wish in CHANNELS else numel
        # In a convolution with two groups, and before it, both groups of channels lose equally many.
        rows = 2 if wish == "dependent" and name in ("stem", "left", "right") else 1
        result[name] = rows * int(ratio * (grains // rows)) * (numel // grains)
    return result


def check_channels(masks: dict[str, dict[str, Tensor]], wish: str) -> None:
    kept = {name: masks[name]["weight"].flatten(1).any(1) for name in masks if name in WIDTHS}
    for name, rows in kept.items():
        assert torch.equal(masks[name]["weight"].flatten(1).all(1), rows)
        assert torch.equal(masks[name]["bias"].bool(), rows)
    if wish == "dependent":
        assert torch.equal(kept["left"], kept["right"])
        for name in ("stem", "left", "right"):
            assert kept[name].view(2, -1).sum(1).tolist() == 2 * [WIDTHS[name] // 4]
            assert all(torch.equal(mask.bool(), kept[name]) for mask in masks[name + "_norm"].values())


def search(model: Any, pruner: LotteryJackpotPruner, wish: str, run: str, last: Any = None) -> Any:
    """Search, check the masks on the way, and return the last compressor of the chain."""
    scheduled, steps, epochs, shares = RUNS[run]
    compressor = last or (scheduled(pruner, interval_steps=2, total_times=4) if scheduled else pruner)
    start, seen = masks_of(pruner), []

    def look(module: Any, args: Any) -> None:
        if module.training:  # losses are compared in eval mode
            seen.append(zeros_of(pruner))

    watch = model.register_forward_pre_hook(look)
    compressor.compress(steps, epochs)
    watch.remove()
    if wish == "global":
        sizes = expected_zeros(wish, 1.0)
        totals = [int(0.5 * share * sum(sizes.values())) for share in shares]
        assert [sum(zeros.values()) for zeros in seen] == totals
        assert seen[-1] != expected_zeros(wish, 0.5)
        assert all(zeros <= int(0.9 * sizes[name]) for name, zeros in seen[-1].items())
    else:
        assert seen == [expected_zeros(wish, 0.5 * share) for share in shares]
    found = masks_of(pruner)
    assert zeros_of(pruner) == seen[-1]
    assert any(not torch.equal(found[name]["weight"], start[name]["weight"]) for name in seen[-1])
    if wish in CHANNELS:
        check_channels(found, wish)
    return compressor


def give_back(model: Any, compressor: Any, dense: dict[str, Tensor]) -> None:
    compressor.unwrap_model()
    assert frozen(model, dense)
    assert all(parameter.requires_grad for parameter in model.parameters())


@both_kinds
@pytest.mark.parametrize(
    ("wish", "run"),
    [
        pytest.param(wish, run, marks=pytest.mark.honours(*FEATURES[wish], *FEATURES[run]))
        for wish, runs in SEARCHES.items()
        for run in runs
    ],
)
def test_search_and_speedup(kind: str, wish: str, run: str, batches: Batches, tmp_path: Path) -> None:
    model, evaluator, prefix = make(kind, batches, tmp_path)
    dense, size = dense_of(model), sum(p.numel() for p in model.parameters())
    pruner = LotteryJackpotPruner(model, configs(wish, model, prefix), evaluator, **OPTIONS)
    compressor = search(model, pruner, wish, run)
    assert frozen(model, dense)
    masks, masked = compressor.get_masks(), model.eval()(X).detach()
    give_back(model, compressor, dense)
    assert not torch.allclose(model(X), masked, rtol=1e-4, atol=1e-5)
    if wish in CHANNELS:
        assert not torch.allclose(masked, masked[:1], rtol=1e-4, atol=1e-5)  # it depends on the input
        small = ModelSpeedup(model, X, masks).speedup_model().eval()
        torch.testing.assert_close(small(X), masked, rtol=1e-4, atol=1e-5)
        halved = WIDTHS if wish == "dependent" else ("top", "hidden")
        rows = {name: small.get_submodule(prefix + name).weight.shape[0] for name in WIDTHS}
        assert rows == {name: n // 2 if name in halved else n for name, n in WIDTHS.items()}
        assert sum(p.numel() for p in small.parameters()) < (0.3 if wish == "dependent" else 0.8) * size


def quantize(pruner: LotteryJackpotPruner, quantizer_class: Any, prefix: str) -> Any:
    wish = {"target_names": ["weight", "_output_"], "quant_dtype": "int8", "quant_scheme": "symmetric"}
    return quantizer_class.from_compressor(pruner, [{"op_names": [prefix + name for name in WIDTHS], **wish}])


@pytest.mark.honours("Adaptive1dLayerwiseDistiller")
@both_kinds
@pytest.mark.parametrize(
    ("last_class", "wish"),
    [
        honours("QATQuantizer", QATQuantizer, "dependent"),
        honours("LsqQuantizer", LsqQuantizer, "weights"),
        honours("AGPPruner", AGPPruner, "channels"),
    ],
)
def test_fusion(kind: str, last_class: Any, wish: str, batches: Batches, tmp_path: Path) -> None:
    model, evaluator, prefix = make(kind, batches, tmp_path)
    dense, config_list, teacher = dense_of(model), configs(wish, model, prefix), copy.deepcopy(model).eval()
    distilled = [{"op_names": [prefix + "hidden"], "link": prefix + "head", "lambda": 0.1}]
    distiller = Adaptive1dLayerwiseDistiller(model, distilled, evaluator, teacher, lambda x, net: net(x[0]))
    distiller.track_forward(X)
    pruner = LotteryJackpotPruner.from_compressor(distiller, config_list, **OPTIONS)
    learned: list[list[Tensor]] = []

    def watch(*_: Any) -> None:
        scales = [p for name, p in model.named_parameters() if name.endswith("_scale")]
        maps = distiller.trans_linears[prefix + "hidden"]["_output_0"].parameters()
        learned.append([p.detach().clone() for p in [*maps, *scales]])

    last = None if last_class is AGPPruner else quantize(pruner, last_class, prefix)
    model.register_forward_pre_hook(watch)
    last = search(model, pruner, wish, "steps" if last else "agp", last)
    # The others still train: the distiller its feature map, LSQ the scales of weights and outputs.
    assert len(learned[1]) == 2 + (2 * len(WIDTHS) if last_class is LsqQuantizer else 0)
    assert all(not torch.equal(a, b) for a, b in zip(learned[1], learned[-1], strict=True))
    give_back(model, last, dense)


@both_kinds
@pytest.mark.parametrize(
    "company", ["alone", honours("AGPPruner", "scheduled"), honours("QATQuantizer", "quantized")]
)
def test_norm_statistics_are_held(kind: str, company: str, batches: Batches, tmp_path: Path) -> None:
    model, evaluator, prefix = make(kind, batches, tmp_path)
    pruner = LotteryJackpotPruner(model, configs("channels", model, prefix), evaluator, **OPTIONS)
    mean = model.get_buffer(prefix + "stem_norm.running_mean")
    before = mean.clone()
    last = quantize(pruner, QATQuantizer, prefix) if company == "quantized" else None
    last = search(model, pruner, "channels", "agp" if company == "scheduled" else "steps", last)
    assert torch.equal(mean, before)
    last.unwrap_model()
    model.train()(X)
    assert not torch.equal(mean, before)  # the model's own again
