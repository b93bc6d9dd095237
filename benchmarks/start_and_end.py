"""Losses of masks before and after short searches by the default recipe.

    python benchmarks/start_and_end.py

Three networks learn scikit-learn's digits: with batch norm, without any norm, and a transformer. The first
1,000 images train, 200 are held out for the search, and the rest are compared here.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner

RATIOS = (0.5, 0.7, 0.9)
SEARCHED = {"Linear", "Conv2d", "MultiheadAttention", "NonDynamicallyQuantizableLinear"}
TRAIN, HELD_OUT = 1000, 200


class Transformer(nn.Module):
    """Two blocks over the eight rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.place = nn.Parameter(torch.randn(8, 64) * 0.1)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the classes, of shape (batch, 10)."""
        return self.head(self.blocks(self.embed(images[:, 0]) + self.place).mean(1))


def convolutions() -> nn.Module:
    """Return a convolutional network with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """Return a network without norm layers."""
    hidden = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": convolutions,
    "no norm": perceptron,
    "transformer": Transformer,
}


def main() -> None:
    """Print a table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80, 320])
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    args = parser.parse_args()
    seeds, lengths, epochs = (1, [5], 1) if args.smoke else (args.seeds, args.steps, 15)
    print(f"$ python benchmarks/start_and_end.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(
        f"Losses on {len(_digits()[0]) - TRAIN - HELD_OUT} images, mean ± standard deviation of {seeds} seeds"
    )
    print("| network | zeros | dense | start | " + " | ".join(f"{n} steps" for n in lengths) + " |")
    print("| --- " * (4 + len(lengths)) + "|")
    for name in NETWORKS:
        rows: dict[float, list[list[float]]] = {ratio: [] for ratio in RATIOS}
        for seed in range(seeds):
            model = _trained(name, seed, epochs)
            for ratio, found in rows.items():
                found.append([_loss(model, "rest"), *_losses(copy.deepcopy(model), ratio, lengths, seed)])
        for ratio, found in rows.items():
            cells = [_cell(list(column)) for column in zip(*found, strict=True)]
            print(f"| {name} | {ratio:.0%} | " + " | ".join(cells) + " |", flush=True)


def _losses(model: nn.Module, ratio: float, lengths: list[int], seed: int) -> Iterator[float]:
    """Yield the loss of the initial masks, and of those after each search."""
    for number, steps in enumerate(lengths):
        kinds = {type(module).__name__ for module in model.modules()} & SEARCHED
        config_list = [{"op_types": sorted(kinds), "sparse_ratio": ratio}]
        pruner = LotteryJackpotPruner(model, config_list)
        batches = [images for images, _ in _batches(seed, 1)]
        if number == 0:
            pruner.reestimate_norm(batches)
            yield _loss(model, "rest")
        model.train()
        search = pruner.begin(steps, held_out=lambda: _loss(model, "held out"))
        data = _batches(seed, steps)
        for _ in range(steps):
            images, labels = next(data)
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            search.step(loss)
        search.finish(norm_batches=batches)
        yield _loss(model, "rest")
        pruner.unwrap_model()


def _trained(name: str, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for images, labels in _batches(seed, epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def _batches(seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for places in torch.randperm(TRAIN, generator=generator).split(50):
            yield images[places], labels[places]


@torch.no_grad()
def _loss(model: nn.Module, part: str) -> float:
    images, labels = _digits()
    places = slice(TRAIN, TRAIN + HELD_OUT) if part == "held out" else slice(TRAIN + HELD_OUT, None)
    was_training = model.training
    if part == "rest":
        model.eval()
    loss = F.cross_entropy(model(images[places]), labels[places]).item()
    model.train(was_training)
    return loss


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
