"""Search in your own training loop: no evaluator, any optimizer; masks follow the scores automatically.

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


def train(optimizer, epochs):
    for _ in range(epochs):
        for at in torch.randperm(1400).split(64):
            loss = F.cross_entropy(model(images[at]), labels[at])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def accuracy():
    with torch.no_grad():
        return (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


train(torch.optim.Adam(model.parameters(), lr=1e-3), epochs=15)  # replace by your pre-trained checkpoint
print(f"dense:          {accuracy():.1%}")

pruner = LotteryJackpotPruner(
    model, [{"op_types": ["Linear"], "sparse_ratio": 0.95, "exclude_op_names": ["4"]}]
)
print(f"magnitude mask: {accuracy():.1%}")

train(torch.optim.SGD(pruner.score_parameters(), lr=5.0, momentum=0.9), epochs=15)
print(f"jackpot:        {accuracy():.1%}, at 95% sparsity")

model, masks = pruner.compress()  # the current masks
print({name: f"{int(mask['weight'].sum())} of {mask['weight'].numel()} kept" for name, mask in masks.items()})
