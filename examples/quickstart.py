"""Find a lottery jackpot with NNI's evaluator: 90 % of the weights pruned, the others unchanged.

Run it with: python examples/quickstart.py
"""

from nni_jackpot import LotteryJackpotPruner, apply_masks, mask_overlap, save_masks

import nni
import torch
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
)


# The NNI part: a training step, a training loop, a traced optimizer.
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


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
training_func(model, optimizer, training_step, max_epochs=15)  # replace by your pre-trained checkpoint
print(f"dense:          {accuracy(model):.1%}")

# The pruner, used like any NNI pruner.
config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 0}]
evaluator = TorchEvaluator(training_func, optimizer, training_step)
pruner = LotteryJackpotPruner(model, config_list, evaluator)
magnitude_masks = pruner.get_masks()
print(f"magnitude mask: {accuracy(model):.1%}")

# Batch-norm statistics are estimated once more, under the final masks.
model, masks = pruner.compress(max_epochs=10, norm_batches=images[train].split(64))
print(f"jackpot:        {accuracy(model):.1%}, at 90% sparsity")
print(f"overlap of jackpot and magnitude mask: {mask_overlap(masks, magnitude_masks).total:.1%}")

pruner.unwrap_model()  # the original model, weights unchanged bit for bit
save_masks(masks, "runs/quickstart/masks.pth")  # NNI's format
apply_masks(model, masks)  # a plain sparse PyTorch model
zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 3, 6))
print(f"plain model:    {accuracy(model):.1%}, {zeros} of its convolutions' weights are zero")
