"""The models of the benchmarks by name, and the inputs of a training step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.experiment.models.vgg import VGG19

TARGET_TYPES = (nn.Conv2d, nn.Linear)


def _tiny(pixels: int) -> nn.Module:
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8, 10))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "vgg19": lambda pixels: VGG19(num_classes=10, in_channels=3),
    "resnet50": lambda pixels: torchvision.models.resnet50(),
    "vit_b_16": lambda pixels: torchvision.models.vit_b_16(image_size=pixels),
    "tiny": _tiny,
}


class Case(NamedTuple):
    """A model, its image size and its batch size, written ``vgg19@32:64``."""

    name: str
    pixels: int
    batch: int

    def __str__(self) -> str:
        return f"{self.name}@{self.pixels}:{self.batch}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Parse ``name@pixels:batch``."""
        name, sizes = text.split("@")
        if name not in MODELS:
            raise ValueError(name)
        return cls(name, *map(int, sizes.split(":")))

    def build(self) -> nn.Module:
        """Return the model with random weights from a fixed seed; speed does not depend on the values."""
        torch.manual_seed(0)
        model = MODELS[self.name](self.pixels)
        for module in targets_of(model):  # torchvision's ViT ends in zeros, which let no gradient through
            if not module.weight.any():
                nn.init.xavier_uniform_(module.weight)
        return model


def targets_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are searched: NNI's ``Conv2d`` and ``Linear`` modules."""
    return [module for module in model.modules() if type(module) in TARGET_TYPES]


def add_options(parser: argparse.ArgumentParser, cases: list[str]) -> None:
    """Add the options of a training step."""
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(case) for case in cases])
    parser.add_argument("--amp", action="store_true", help="forward passes with autocast to bfloat16")
    parser.add_argument(
        "--channels-last", action="store_true", help="weights and images in the channels-last layout"
    )


@dataclass
class Job:
    """A model, one batch and the loss."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    amp: bool

    @classmethod
    def of(cls, case: Case, args: argparse.Namespace) -> Job:
        """Create the job of a case from the command line options."""
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = case.build().to(args.device)
        if args.channels_last:
            model = model.to(memory_format=layout)
        images = torch.randn(case.batch, 3, case.pixels, case.pixels).to(args.device, memory_format=layout)
        labels = torch.randint(10, (case.batch,)).to(args.device)
        return cls(model.train(), (images, labels), args.amp)

    def training_step(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """Return the loss, with the signature of an evaluator's training step."""
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return F.cross_entropy(model(images), labels)
