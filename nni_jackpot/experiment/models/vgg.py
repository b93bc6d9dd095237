"""VGG-19 for small images (Simonyan and Zisserman 2015), as the papers on pruning have it for CIFAR.

Sixteen convolutions with batch norm and one linear classifier. As in the residual network, modules are used
once and operations are plain, so that tracers see the whole graph.
"""

from __future__ import annotations

from torch import Tensor, nn

# Filters of the convolutions between one max-pooling and the next.
STAGES = (64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4


class VGG19(nn.Module):
    """``features`` (convolutions, norms and pools), mean over the pixels that are left, ``classifier``.

    Parameters
    ----------
    num_classes
        Outputs.
    in_channels
        Channels of the input.

    Notes
    -----
    (N, in_channels, H, W) -> logits (N, num_classes), for H and W of at least 16. The stages work at H, H/2,
    H/4, H/8 and H/16, rounded down.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for filters in stage:
                convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(filters), nn.ReLU()]
                channels = filters
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, H, W) -> (N, num_classes)."""
        return self.classifier(self.flatten(self.pool(self.features(x))))
