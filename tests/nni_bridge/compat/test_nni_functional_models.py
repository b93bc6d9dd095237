"""Networks written with PyTorch's functions, as users write them: pruned and shrunk by NNI."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from nni_pruning import same, speedup
from torch import Tensor, nn
from torch.nn import functional as F

import nni_jackpot  # noqa: F401


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc1 = nn.Linear(12 * 5 * 5, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        return self.fc2(F.dropout(x, training=self.training))


class LeNetOfSizes(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = F.max_pool2d(F.relu(self.conv1(x)), kernel_size=2, return_indices=True)
        x = F.max_pool2d(torch.relu(self.conv2(x)), kernel_size=2, stride=2)
        x = x.view(-1, self.features(x))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)

    def features(self, x: Tensor) -> int:
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


class SegNet(nn.Module):
    """Pools with indices and unpools with them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return self.up(F.max_unpool2d(pooled, indices, 2, output_size=x.size()))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.Conv2d(20, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(high, 2)))
        low = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        height = high.size()[2] - low.size()[2]
        width = high.size()[3] - low.size()[3]
        low = F.pad(low, [width // 2, width - width // 2, height // 2, height - height // 2])
        return self.last(F.relu(self.up(torch.cat([high, low], dim=1))))


class UNetOfSizes(UNet):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        high = F.leaky_relu(self.down1(x), 0.1)
        low = self.down2(F.avg_pool2d(high, kernel_size=(2, 2)))
        low = F.interpolate(low, size=tuple(high.shape[-2:]))
        x = self.last(self.up(torch.cat((high, low), 1)))
        return OrderedDict(out=x, small=F.adaptive_avg_pool2d(x, (2, 2)))


class Pools(nn.Module):
    """One branch per kind of pooling, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(40, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        size = [side // 2 for side in x.shape[2:]]
        branches = [
            F.max_pool2d(x, 2),
            F.lp_pool2d(x, 2, 2),
            F.adaptive_max_pool2d(x, size),
            F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 4, stride=2),
            F.max_pool1d(x.flatten(2), 4).unflatten(2, tuple(size)),
        ]
        return self.last(torch.cat(list(branches), dim=1))


class Attention(nn.Module):
    """Attention between pixels, after a convolution that loses channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 12, 1)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.mix(F.gelu(self.conv(x))))
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = tokens.chunk(3, dim=-1)
        tokens = F.layer_norm(F.scaled_dot_product_attention(q, k, v), v.shape[-1:])
        return self.last(tokens).mean(1)


class Branches(nn.Module):
    """Lists, zip and enumerate inside forward, sizes as tuples, a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, 3) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for i, (conv, head) in enumerate(zip(self.convs, self.heads, strict=True)):
            y = F.silu(conv(x))
            if isinstance(y, list):
                y = torch.cat(y, 1)
            found.append(head(y) * (i + 1))
        a, b = tuple(found)
        parts = list(torch.split(a, 2, dim=1))
        flat = b.reshape(b.size()[:2] + (-1,))  # noqa: RUF005  # as users do arithmetic on sizes
        return torch.stack(parts, dim=2), flat / flat.shape[1:].numel()


PRUNED = {
    LeNet: ["conv1", "conv2", "fc1"],
    LeNetOfSizes: ["conv1", "conv2", "fc1"],
    SegNet: ["down"],
    UNet: ["down1", "down2", "up"],
    UNetOfSizes: ["down1", "down2", "up"],
    Pools: ["conv"],
    Attention: ["conv"],
    Branches: ["convs.0", "convs.1"],
}


@pytest.mark.parametrize("network", PRUNED, ids=lambda network: network.__name__)
def test_networks_of_functions_shrink_and_compute_the_same(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network()
    config_list = [{"op_names": PRUNED[network], "sparse_ratio": 0.5}]
    left, masked, after = speedup(model, 28, config_list)
    assert left < 0.8
    for name in PRUNED[network]:
        assert len(model.get_submodule(name).weight) == len(network().get_submodule(name).weight) // 2
    same(after, masked)
