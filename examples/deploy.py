"""Deploy: pre-trained network -> jackpot -> int8 -> ONNX file, smaller and faster than the dense network.

NNI's quantizers simulate int8 in PyTorch and show the loss of accuracy, with the masks fixed. onnxruntime
writes the file itself. Needs: pip install "nni-jackpot[deploy]"

Run it with: python examples/deploy.py
"""

import time
import zipfile
from pathlib import Path

from nni_jackpot import EdgePopup, LotteryJackpotPruner, apply_masks, load_masks, save_masks
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.speedup import export_onnx, quantize_onnx

import nni
import onnx
import onnxruntime
import torch
from nni.compression.quantization import PtqQuantizer
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch.nn import functional as F


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)
folder = Path("runs/deploy")
model = ResNet(depth=8, width=32, num_classes=10, in_channels=1)


def training_step(batch, model):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def training_func(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
    for _ in range(max_epochs):
        model.train()
        for at in torch.randperm(1400).split(64):
            loss = training_step((images[train][at], labels[train][at]), model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def report(name, logits):
    print(f"{name + ':':28}{(logits.argmax(1) == labels[test]).float().mean():7.2%}")


@torch.no_grad()
def logits(model):
    return model.eval()(images[test])


class Session:
    """An ONNX file in onnxruntime."""

    def __init__(self, name):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(folder / name, options, providers=providers)
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images):
        return torch.from_numpy(self.session.run(None, {self.input: images.numpy()})[0])


def seconds(sessions, runs=30):
    """Return each session's median time for 256 images; sessions are timed alternately."""
    times = [[] for _ in sessions]
    for _ in range(runs):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session(images[:256])
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[runs // 2] for taken in times]


def kib(name):
    """Return the size of a file, and its zipped size."""
    with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / name, name)
    return [(folder / file).stat().st_size / 1024 for file in (name, f"{name}.zip")]


# "Pre-trained": in your work, the checkpoint you load.
training_func(model, torch.optim.Adam(model.parameters(), lr=3e-3), training_step, max_epochs=8)
report("dense", logits(model))
export_onnx(model, folder / "dense.onnx", images[:1])

# The jackpot, and its masks in NNI's format.
config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 0}]
optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)  # drives the loop, but gets no gradients
evaluator = TorchEvaluator(training_func, optimizer, training_step)
pruner = LotteryJackpotPruner(model, config_list, evaluator)
pruner.compress(max_steps=None, max_epochs=20)
report("jackpot", logits(model))
save_masks(pruner.get_masks(), folder / "masks.pth")
pruner.unwrap_model()

# Accuracy in int8, simulated by NNI. A learning rate of 0 keeps the masks, and the adapted norm statistics
# are frozen too.
masks = load_masks(folder / "masks.pth")
hold = {"init": masks, "method": EdgePopup.paper(lr=0.0), "norm": "freeze"}
held = LotteryJackpotPruner(model, config_list, evaluator, **hold)
int8 = {"target_names": ["weight", "_input_"], "quant_dtype": "int8", "quant_scheme": "affine"}
quantizer = PtqQuantizer.from_compressor(held, [{"op_types": ["Conv2d"], **int8}])
quantizer.compress(max_steps=None, max_epochs=1)
report("jackpot, int8 simulated", logits(model))
quantizer.unwrap_model()

# The files: the sparse network in float32 and in int8.
apply_masks(model, masks)
export_onnx(model, folder / "jackpot.onnx", images[:1])
quantize_onnx(folder / "jackpot.onnx", folder / "int8.onnx", images[train][:256].split(64))
dense, jackpot, quantized = sessions = [Session(f"{name}.onnx") for name in ("dense", "jackpot", "int8")]
report("jackpot, onnxruntime", jackpot(images[test]))
report("jackpot, onnxruntime int8", quantized(images[test]))

tensors = onnx.load(folder / "int8.onnx").graph.initializer
weights = [onnx.numpy_helper.to_array(tensor) for tensor in tensors if len(tensor.dims) == 4]
print(
    f"zeros among the int8 weights: {sum((w == 0).sum() for w in weights) / sum(w.size for w in weights):.2%}"
)
for name, taken in zip(("dense", "jackpot", "int8"), seconds(sessions), strict=True):
    size, zipped = kib(f"{name}.onnx")
    print(
        f"{name + '.onnx:':14}{size:7.0f} KiB, zipped {zipped:7.0f} KiB, median latency {1000 * taken:.1f} ms"
    )
