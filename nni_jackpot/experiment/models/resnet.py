"""The small residual network for small images (He et al. 2016, Sec. 4.2), with shortcuts of option A.

Every operation is a plain module or function on tensors, each module is used once, and control flow depends
on no tensor, so that tracers see the whole graph. The first convolution of each block (``stage*.*.conv1``)
can lose channels without regard to the shortcuts.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def pad_shortcut(x: Tensor, new_channels: int) -> Tensor:
    """Take every second pixel, and append channels of zeros (option A).

    (N, C, H, W) -> (N, C + new_channels, ceil(H / 2), ceil(W / 2)).
    """
    # Pooling over single pixels subsamples like x[:, :, ::2, ::2], in one operation that tracers know.
    x = F.avg_pool2d(x, kernel_size=1, stride=2)
    return F.pad(x, (0, 0, 0, 0, 0, new_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Notes
    -----
    (N, in_channels, H, W) -> (N, channels, H', W'), with H' = H where the channels stay, and H' = ceil(H / 2)
    where they grow.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.new_channels = channels - in_channels
        stride = 2 if self.new_channels else 1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut."""
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = pad_shortcut(x, self.new_channels) if self.new_channels else x
        return self.relu2(residual + shortcut)


class ResNet(nn.Module):
    """Residual network of 6n + 2 layers: ``conv1``, three stages of n blocks, mean over pixels, ``fc``.

    Parameters
    ----------
    depth
        Layers with weights: 8, 14, 20, ...
    width
        Filters of the first stage; the second has twice, the third four times as many.
    num_classes
        Outputs.
    in_channels
        Channels of the input.

    Notes
    -----
    (N, in_channels, H, W) -> logits (N, num_classes). The stages work at H, H/2 and H/4, rounded up.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stage1 = _stage(width, width, blocks)
        self.stage2 = _stage(width, 2 * width, blocks)
        self.stage3 = _stage(2 * width, 4 * width, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, in_channels, H, W) -> (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.flatten(self.pool(x)))


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, channels), *(BasicBlock(channels, channels) for _ in range(blocks - 1))
    )
