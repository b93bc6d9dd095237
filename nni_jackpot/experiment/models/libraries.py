"""Classifiers of torchvision and timm, with random or published weights, for any number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol

import torchvision.models
from torch import nn

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, first_line
from nni_jackpot.experiment.data.preprocess import CENTER, SQUASH, Inputs, Preprocess
from nni_jackpot.experiment.models.published import place_of, read_safely
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.runtime.extras import library


class Library(Protocol):
    """A library of networks."""

    def names(self) -> list[str]:
        """Return the names of all classifiers."""

    def weights(self, name: str) -> list[str]:
        """Return the names of the weights published for a classifier."""

    def classes(self, name: str, weights: str) -> int:
        """Return the number of classes of such weights."""

    def inputs(self, name: str, weights: str | None) -> Inputs:
        """Return the inputs that weights were made for; without weights, those that the library prefers.

        Raises
        ------
        ExperimentConfigError
            If the library prepares images in another way than by a resize and a central crop.
        """

    def build(self, name: str, weights: str | None, num_classes: int, in_channels: int) -> nn.Module:
        """Build a classifier; published weights get a new last layer for another number of classes.

        Raises
        ------
        CheckpointError
            If the weights cannot be had.
        ExperimentConfigError
            If they are for images of another number of channels.
        """


class Torchvision:
    """Weights are named as in torchvision, ``IMAGENET1K_V1``, and kept in the folder of ``torch.hub``."""

    def names(self) -> list[str]:
        """Return the names of torchvision's image classifiers."""
        return torchvision.models.list_models(module=torchvision.models)

    def weights(self, name: str) -> list[str]:
        """Return the names in torchvision's enum of weights."""
        return list(torchvision.models.get_model_weights(name).__members__)

    def classes(self, name: str, weights: str) -> int:
        """Return the number of categories of the weights."""
        return len(torchvision.models.get_model_weights(name)[weights].meta["categories"])

    def inputs(self, name: str, weights: str | None) -> Inputs:
        """Return what ``weights.transforms()`` does, of the default weights for a network without any."""
        known = torchvision.models.get_model_weights(name)
        steps = known[weights or "DEFAULT"].transforms()
        (size,), (resize,) = steps.crop_size, steps.resize_size
        how = steps.interpolation.value
        return _inputs(size, resize=resize, interpolation=how, mean=steps.mean, std=steps.std)

    def build(self, name: str, weights: str | None, num_classes: int, in_channels: int) -> nn.Module:
        """Build a classifier, without auxiliary ones, which would make the output a tuple in training."""
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        if weights is None:
            if options:  # the recommended initialization; without it torchvision warns
                options["init_weights"] = True
            model = torchvision.models.get_model(name, num_classes=num_classes, **options)
            if in_channels != 3:
                _replace_stem(model, in_channels)
            return model
        if in_channels != 3:
            raise ExperimentConfigError(
                f"model.weights: {weights} of torchvision/{name} are for images of 3 channels, the dataset's "
                f"have {in_channels}; allowed: null"
            )
        published = torchvision.models.get_model_weights(name)[weights]
        try:
            with read_safely(published):
                model = torchvision.models.get_model(name, weights=published, **options)
        except Exception as error:  # a failed connection, a damaged file, a file of another kind
            raise CheckpointError(
                f"weights {weights} of torchvision/{name} cannot be loaded: {first_line(error)}. Without a "
                f"network, put {published.url} at {place_of(published.url)}"
            ) from error
        if num_classes != (known := self.classes(name, weights)):
            _replace_classifier(model, known, num_classes)
        return model


class Timm:
    """Weights are named by timm's tags, ``a1_in1k``, or ``default``."""

    def names(self) -> list[str]:
        """Return timm's names, without tags."""
        return _timm().list_models()

    def weights(self, name: str) -> list[str]:
        """Return ``default``, which is one of the tags, and all tags."""
        tagged = _timm().list_models(f"{name}.*", pretrained=True)
        return ["default", *(full.partition(".")[2] for full in tagged)] if tagged else []

    def classes(self, name: str, weights: str) -> int:
        """Return the number of classes in timm's records."""
        return _timm().get_pretrained_cfg(_full(name, weights)).num_classes

    def inputs(self, name: str, weights: str | None) -> Inputs:
        """Return ``resolve_data_config`` of the weights; of the default tag for a network without any."""
        record = _timm().get_pretrained_cfg(_full(name, weights or "default"))
        known = import_module("timm.data").resolve_data_config(
            {}, pretrained_cfg=record.to_dict() if record is not None else {}
        )
        _, height, width = known["input_size"]
        if height != width or known["crop_mode"] not in (CENTER, SQUASH):
            raise Invalid(
                "data.transform",
                f"found null, allowed for timm/{name}: module:function, for its images are {height} x "
                f"{width} with crop mode {known['crop_mode']}",
            )
        own = {key: known[key] for key in ("interpolation", "mean", "std")}
        return _inputs(height, resize=math.floor(height / known["crop_pct"]), crop=known["crop_mode"], **own)

    def build(self, name: str, weights: str | None, num_classes: int, in_channels: int) -> nn.Module:
        """Build a classifier; timm sums the first filters over channels for images of one channel."""
        sizes = {"num_classes": num_classes, "in_chans": in_channels}
        if weights is None:
            return _timm().create_model(name, **sizes)
        try:
            return _timm().create_model(_full(name, weights), pretrained=True, **sizes)
        except Exception as error:  # timm's hub raises the errors of its HTTP client
            raise CheckpointError(
                f"weights {weights} of timm/{name} cannot be loaded: {first_line(error)}"
            ) from error


LIBRARIES: dict[str, Library] = {"torchvision": Torchvision(), "timm": Timm()}


def _inputs(size: int, *, mean: Iterable[float], std: Iterable[float], **values: Any) -> Inputs:
    crop = values.pop("crop", CENTER)
    return Inputs(size, Preprocess(crop=crop, mean=tuple(mean), std=tuple(std), **values))


def _timm() -> Any:
    return library("timm", "timm", "networks timm/NAME need")


def _full(name: str, weights: str) -> str:
    return name if weights == "default" else f"{name}.{weights}"


def _replace_stem(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution, which takes RGB in all of torchvision's classifiers."""
    name, stem = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    model.set_submodule(
        name,
        nn.Conv2d(
            in_channels,
            stem.out_channels,
            stem.kernel_size,  # type: ignore[arg-type]
            stem.stride,  # type: ignore[arg-type]
            stem.padding,  # type: ignore[arg-type]
            bias=stem.bias is not None,
        ),
    )


def _replace_classifier(model: nn.Module, known: int, num_classes: int) -> None:
    """Replace the last layer, linear or (in SqueezeNet) a 1x1 convolution."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    new: nn.Module
    if isinstance(last, nn.Linear):
        assert last.out_features == known
        new = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    else:
        assert last.out_channels == known
        new = nn.Conv2d(last.in_channels, num_classes, 1)
    model.set_submodule(name, new)
