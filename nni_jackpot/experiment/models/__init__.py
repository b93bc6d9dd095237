"""Networks by name: ``resnet`` and ``vgg19``, those of torchvision and timm, and folders of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nni_jackpot.errors import ExperimentConfigError, first_line
from nni_jackpot.experiment.data.preprocess import IMAGENET, Inputs
from nni_jackpot.experiment.models.folders import TRANSFORMERS
from nni_jackpot.experiment.models.initial import draw_weights
from nni_jackpot.experiment.models.libraries import LIBRARIES
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.experiment.models.vgg import VGG19
from nni_jackpot.experiment.models.vision import inputs_of_folder

if TYPE_CHECKING:  # the config imports this module
    from nni_jackpot.experiment.models.section import ModelConfig, ModelSection


def _resnet(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    return ResNet(config.depth, config.width, num_classes, in_channels)


def _vgg19(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    return VGG19(num_classes, in_channels)


MODELS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {"resnet": _resnet, "vgg19": _vgg19}


def model_names(like: str) -> list[str]:
    """Return the names of all networks; of the libraries, only of the one that ``like`` names.

    Raises
    ------
    MissingLibraryError
        If that library is not installed.
    """
    library, slash, _ = like.partition("/")
    known = LIBRARIES[library].names() if slash and library in LIBRARIES else []
    return [*MODELS, *(f"{library}/{name}" for name in known)]


def weights_names(model: str) -> list[str]:
    """Return the names of the published weights of a network."""
    library, slash, name = model.partition("/")
    return LIBRARIES[library].weights(name) if slash else []


def inputs_of(config: ModelSection) -> Inputs:
    """Return the inputs that a network was made for; PyTorch's reference, if no library says."""
    if config.name.startswith(TRANSFORMERS):
        return inputs_of_folder(config.name)
    library, slash, name = config.name.partition("/")
    weights = getattr(config, "weights", None)
    return LIBRARIES[library].inputs(name, weights) if slash else IMAGENET


def has_new_classifier(config: ModelConfig, num_classes: int) -> bool:
    """Return True if published weights need a new classifier, for another number of classes."""
    if config.weights is None:
        return False
    library, _, name = config.name.partition("/")
    return LIBRARIES[library].classes(name, config.weights) != num_classes


def build_model(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Build the network of a config, its random weights drawn from PyTorch's global generator.

    Parameters
    ----------
    config
        Name, size and weights of the network.
    num_classes
        Number of outputs, one logit per class.
    in_channels
        Channels of the input images.

    Returns
    -------
    nn.Module
        In train mode, on the CPU; (N, in_channels, H, W) -> logits (N, num_classes).

    Raises
    ------
    CheckpointError
        If published weights are missing and cannot be downloaded.
    ExperimentConfigError
        If the weights are for images of another number of channels.
    """
    if config.name in MODELS:
        model = MODELS[config.name](config, num_classes, in_channels)
    else:
        library, _, name = config.name.partition("/")
        model = LIBRARIES[library].build(name, config.weights, num_classes, in_channels)
    if config.init is not None:
        draw_weights(model, config.init)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    return model.train().to(memory_format=layout)


@torch.no_grad()
def validate_model(
    config: ModelSection, model: nn.Module, num_classes: int, shape: tuple[int, int, int]
) -> None:
    """Check that a network maps images (C, H, W) to logits; the network is not changed.

    Raises
    ------
    ExperimentConfigError
        If it does not.
    """
    model.eval()
    try:
        found = model(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ExperimentConfigError(
            f"model.name: {config.name} cannot take images of {' x '.join(map(str, shape))}: "
            f"{first_line(error)}. Set data.image_size to what it takes"
        ) from error
    finally:
        model.train()
    logits = getattr(found, "logits", found)  # transformers nests them
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise ExperimentConfigError(f"model.name: {config.name} gives no logits of {num_classes} classes")
