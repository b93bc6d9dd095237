"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nni_jackpot.experiment.config import ModelConfig
from nni_jackpot.experiment.models.resnet import ResNet


def _resnet(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    return ResNet(config.depth, config.width, num_classes, in_channels)


MODELS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {"resnet": _resnet}


def build_model(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Build the network of a config, its weights drawn from PyTorch's global generator.

    Parameters
    ----------
    config
        Name and size of the network.
    num_classes
        Outputs, one logit a class.
    in_channels
        Channels of the input images.

    Returns
    -------
    nn.Module
        In train mode, on the CPU; (N, in_channels, H, W) -> logits (N, num_classes).
    """
    return MODELS[config.name](config, num_classes, in_channels)
