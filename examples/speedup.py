"""NNI's quick start on current PyTorch: prune channels, shrink the model, then search in it.

``import nni_jackpot`` is enough for NNI's pruners and ModelSpeedup to work. The smaller model is then the
base of a jackpot, whose masks ModelSpeedup reads from a file.

Run it with: python examples/speedup.py
"""

import time

from nni_jackpot import LotteryJackpotPruner, apply_masks, save_masks

import nni
import torch
import torchvision
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def seconds(model, x, runs=15):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


nni.silence_stdout()  # of the lines that NNI's speedup logs for every module
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()  # replace by your pre-trained checkpoint
x = torch.randn(4, 3, 64, 64)
size, latency = parameters(model), seconds(model, x)

pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
_, masks = pruner.compress()
pruner.unwrap_model()
ModelSpeedup(model, x, masks).speedup_model()
print(f"parameters: {parameters(model) / size:.2f} of the dense model's")
print(f"median latency: {seconds(model, x) / latency:.2f} of the dense model's")

pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}])
_, masks = pruner.compress()  # give it an evaluator to search: see quickstart.py
save_masks(masks, "runs/speedup/masks.pth")
expected = model(x)
pruner.unwrap_model()
apply_masks(model, masks)
ModelSpeedup(model, x, "runs/speedup/masks.pth").speedup_model()
print(f"masked and sped-up model differ by at most {(model(x) - expected).abs().max():.1e}")
