"""Search in a training loop of your own, without NNI's evaluator.

Run it with: python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float() / 16, torch.tensor(labels)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def losses(epochs):
    for _ in range(epochs):
        for at in torch.randperm(1400).split(64):
            yield F.cross_entropy(model(images[at]), labels[at])


def accuracy():
    with torch.no_grad():
        return (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


# Stands for your pre-trained checkpoint.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for loss in losses(epochs=15):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"dense:          {accuracy():.1%}")

pruner = LotteryJackpotPruner(
    model, [{"op_types": ["Linear"], "sparse_ratio": 0.95, "exclude_op_names": ["4"]}]
)
print(f"magnitude mask: {accuracy():.1%}")

search = pruner.begin(total_steps=15 * 22)
for loss in losses(epochs=15):
    loss.backward()
    search.step(loss)
masks = search.finish()
print(f"jackpot:        {accuracy():.1%}, at 95% sparsity")
print({name: f"{int(mask['weight'].sum())} of {mask['weight'].numel()} kept" for name, mask in masks.items()})
