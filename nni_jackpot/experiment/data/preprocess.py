"""How an image file becomes the input of a network: resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.settings import Rule, between, one_of, option

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CENTER, SQUASH = "center", "squash"


def _numbers(allowed: str, holds: Callable[[float], bool]) -> Rule:
    def all_hold(value: Any) -> bool:
        return len(value) in (1, 3) and all(type(one) in (int, float) and holds(one) for one in value)

    return Rule(f"of 1 or 3 numbers {allowed}", all_hold)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How image files become inputs of the network; values that are not given are those of the network."""

    resize: int | None = option(
        "pixels of the shorter side before the crop, of both sides with crop: squash; null for the network's "
        "share of image_size",
        between(1, 8192),
        None,
    )
    crop: str | None = option(
        "center: the proportions are kept; squash: the image becomes a square; then the central image_size "
        "pixels are cut out",
        one_of((CENTER, SQUASH)),
        None,
    )
    interpolation: str | None = option("how pixels are resampled", one_of(INTERPOLATIONS), None)
    mean: tuple[float, ...] | None = option(
        "subtracted from each channel, whose values are from 0 to 1",
        _numbers(">= -10 and <= 10", lambda value: -10 <= value <= 10),
        None,
    )
    std: tuple[float, ...] | None = option(
        "divides each channel after that", _numbers("> 0 and <= 10", lambda value: 0 < value <= 10), None
    )

    def normalisation(self, channels: int = 3) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, float32 (channels,), in units of pixels from 0 to 255."""
        mean, std = (
            255 * torch.tensor(values).expand(channels)
            for values in (self.mean or (0.0,), self.std or (1.0,))
        )
        return mean, std

    def transform(self, size: int) -> v2.Compose:
        """Return the steps from a PIL image to uint8 (3, size, size)."""
        resize = self.resize or size
        sides = [resize, resize] if self.crop == SQUASH else resize
        how = InterpolationMode(self.interpolation or "bilinear")
        return v2.Compose([v2.Resize(sides, how), v2.CenterCrop(size), v2.PILToTensor()])


class Inputs(NamedTuple):
    """The inputs that a network was made for: height and width in pixels, and how images become them."""

    size: int
    preprocess: Preprocess

    def with_given(self, size: int | None, given: Preprocess | None) -> Inputs:
        """Return the inputs with given values in place of own ones; null stands for the network's value.

        Raises
        ------
        Invalid
            If the image is smaller than the crop.
        """
        own, size = self.preprocess, size or self.size
        values = {name: getattr(given, name) for name in given_names(given)}
        assert own.resize is not None
        values.setdefault("resize", size * own.resize // self.size)
        if values["resize"] < size:
            raise Invalid("resize", f"found {values['resize']}, allowed: >= image_size, which is {size}")
        return Inputs(size, replace(own, **values))


# PyTorch's reference for ImageNet: of 256 pixels, the central 224.
IMAGENET = Inputs(
    224,
    Preprocess(
        resize=256,
        crop=CENTER,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
)


def given_names(preprocess: Preprocess | None) -> list[str]:
    """Return the names of the values that are not null."""
    return [entry.name for entry in fields(Preprocess) if getattr(preprocess, entry.name, None) is not None]
