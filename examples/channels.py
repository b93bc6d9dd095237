"""Search a channel jackpot: prune whole output channels, then shrink the network with ModelSpeedup.

Run it with: python examples/channels.py [SEED]
"""

import sys
import time

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.experiment.models.resnet import ResNet

import nni
import torch
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch.nn import functional as F


nni.silence_stdout()  # of the lines that NNI's speedup logs for every module
torch.manual_seed(int(sys.argv[1]) if sys.argv[1:] else 0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)
model = ResNet(depth=8, width=16, num_classes=10, in_channels=1)


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


@torch.no_grad()
def logits(model):
    return model.eval()(images[test])


def report(name, model):
    print(f"{name + ':':32}{(logits(model).argmax(1) == labels[test]).float().mean():7.2%}")


@torch.no_grad()
def seconds(models, runs=30):
    """Return each model's median time for 256 images; models are timed alternately."""
    times = [[] for _ in models]
    for _ in range(runs):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images[:256])
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[runs // 2] for taken in times]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# "Pre-trained": in your work, the checkpoint you load.
training_func(model, torch.optim.Adam(model.parameters(), lr=3e-3), training_step, max_epochs=8)
report("dense", model)
dense = ResNet(depth=8, width=16, num_classes=10, in_channels=1)
dense.load_state_dict(model.state_dict())

# The first convolution of every block, whose channels no shortcut uses, and the norm layer after it.
config_list = [{"op_names_re": [r"stage.*conv1"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
for name, _ in model.named_modules():
    if name.endswith("bn1") and name != "bn1":
        source = {"module_name": name.replace("bn1", "conv1"), "target_name": "weight", "dims": [0]}
        settings = {target: {"align": source} for target in ("weight", "bias")}
        config_list.append({"op_names": [name], "target_settings": settings})

optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)  # drives the loop, but gets no gradients
evaluator = TorchEvaluator(training_func, optimizer, training_step)
pruner = LotteryJackpotPruner(model, config_list, evaluator)
pruner.reestimate_norm(images[train].split(200))
report("magnitude channels", model)
pruner.compress(max_steps=None, max_epochs=8)
pruner.reestimate_norm(images[train].split(200))
report("channel jackpot", model)

masks, masked = pruner.get_masks(), logits(model)
pruner.unwrap_model()
small = ModelSpeedup(model, images[:8], masks).speedup_model()
report("channel jackpot, sped up", small)
print(f"masked and sped-up model differ by at most {(logits(small) - masked).abs().max():.1e}")
before, after = seconds([dense.eval(), small])
print(f"parameters: {parameters(small) / parameters(dense):.2f} of the dense model's")
print(f"median latency: {after / before:.2f} of the dense model's")
