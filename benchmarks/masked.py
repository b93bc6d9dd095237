"""Models with masks for the deployment benchmark: jackpots of a small network, random masks of large ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import nni
import torch
from models import Case, targets_of
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.masks import Masks

SPARSE = {"90%": 0.9, "95%": 0.95, "98%": 0.98}
KINDS = ("channels 50%", "2:4", *SPARSE)


@dataclass(frozen=True)
class Masked:
    """A network with its masks of one of the `KINDS`, or dense without masks."""

    kind: str
    model: nn.Module
    """With zeros where the masks have them."""
    masks: Masks
    images: Tensor
    """A batch to time it with."""
    labelled: tuple[Tensor, Tensor] | None
    """Test images and their labels."""


# --- digits


def digits(batch: int, epochs: int, kinds: Iterable[str]) -> Iterable[Masked]:
    """Train the small ResNet on the digits, and search a jackpot of each kind in it."""
    torch.manual_seed(0)
    pixels, all_labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(all_labels)
    test = images[1400:], labels[1400:]

    def training_step(at: Tensor, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images[at]), labels[at])

    def train(
        model: nn.Module,
        optimizer: Any,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int = 1,
    ) -> None:
        model.train()
        for _ in range(max_epochs):
            for at in torch.randperm(1400).split(64):
                training_step(at, model).backward()
                optimizer.step()
                optimizer.zero_grad()

    dense = ResNet(depth=8, width=32, num_classes=10, in_channels=1)
    train(dense, torch.optim.Adam(dense.parameters(), lr=3e-3), training_step, max_epochs=epochs)
    yield Masked("dense", dense.eval(), {}, images[:batch], test)
    for kind in kinds:
        model = copy.deepcopy(dense)
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
        pruner = LotteryJackpotPruner(
            model,
            _config_list(dense, kind),
            TorchEvaluator(train, optimizer, training_step),
            # Batch norm in train mode removes the gradient of a channel's scale.
            norm="freeze" if kind == "channels 50%" else "adapt",
        )
        _, masks = pruner.compress(None, 2 * epochs)
        pruner.reestimate_norm(images[:1400].split(200))
        pruner.unwrap_model()
        yield Masked(kind, apply_masks(model, masks).eval(), masks, images[:batch], test)


def _config_list(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    if kind in SPARSE:
        return [{"op_types": ["Conv2d"], "sparse_ratio": SPARSE[kind], "global_group_id": 0}]
    if kind == "2:4":
        return [{"op_types": ["Conv2d"], "exclude_op_names": ["conv1"], "sparse_pattern": "2:4"}]
    config_list: list[dict[str, Any]] = []
    for conv, norm in _inner_channels(model):
        config_list.append({"op_names": [conv], "sparse_ratio": 0.5, "granularity": "out_channel"})
        source = {"module_name": conv, "target_name": "weight", "dims": [0]}
        settings = {target: {"align": source} for target in ("weight", "bias")}
        config_list.append({"op_names": [norm], "target_settings": settings})
    return config_list


# --- large networks


def random(case: Case, kinds: Iterable[str]) -> Iterable[Masked]:
    """Return a network with random weights and random masks; speed does not depend on the values."""
    images = torch.randn(case.batch, 3, case.pixels, case.pixels)
    yield Masked("dense", case.build().eval(), {}, images, None)
    for kind in kinds:
        model = case.build().eval()
        if kind == "channels 50%":
            masks = _random_channels(model)
        else:
            masks = {
                name: {"weight": _random_mask(module.weight, SPARSE[kind])}
                for name, module in model.named_modules()
                if module in set(targets_of(model))
            }
        yield Masked(kind, apply_masks(model, masks), masks, images, None)


def _random_mask(weight: Tensor, sparsity: float) -> Tensor:
    return (torch.rand_like(weight) >= sparsity).float()


def _random_channels(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    masks: dict[str, dict[str, Tensor]] = {}
    for name, norm in _inner_channels(model):
        weight = model.get_parameter(f"{name}.weight")
        kept = torch.zeros(len(weight))
        kept[torch.randperm(len(weight))[: len(weight) // 2]] = 1
        masks[name] = {"weight": kept.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()}
        if norm:
            masks[norm] = {"weight": kept.clone(), "bias": kept.clone()}
        else:
            masks[name]["bias"] = kept.clone()
    return masks


def _inner_channels(model: nn.Module) -> Iterable[tuple[str, str | None]]:
    """Return the layers without a shortcut on their channels, each with its norm layer if it has one."""
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        blocks = isinstance(module, nn.Conv2d) and parent.startswith(("layer", "stage"))
        if blocks and (
            last == "conv1" or (last == "conv2" and hasattr(model.get_submodule(parent), "conv3"))
        ):
            yield name, f"{parent}.{last.replace('conv', 'bn')}"
        if name.endswith("mlp.0"):
            yield name, None
