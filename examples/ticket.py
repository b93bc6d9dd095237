"""Save a jackpot as a ticket, and apply it in a process that only has the base checkpoint.

Then switch between tickets of two sparsities in one model in memory, and restore the base.

Run it with: python examples/ticket.py
"""

import subprocess
import sys
from pathlib import Path

from nni_jackpot import LotteryJackpotPruner, TicketBox, load_ticket, save_ticket

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

FOLDER = Path("runs/ticket")

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float() / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)


def build():
    return nn.Sequential(
        *(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10)),
    )


def fit(model, optimizer, epochs):
    for _ in range(epochs):
        model.train()
        for at in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[train][at]), labels[train][at]).backward()
            optimizer.step()


@torch.no_grad()
def logits(model):
    return model.eval()(images[test])


def accuracy(model):
    return (logits(model).argmax(1) == labels[test]).float().mean().item()


if sys.argv[1:] == ["apply"]:  # everything a user of the ticket has to do
    model = build()
    model.load_state_dict(torch.load(FOLDER / "base.pth"))
    load_ticket(FOLDER / "90.ticket").apply(model)
    torch.save(logits(model), FOLDER / "logits.pth")
    sys.exit()

base = build()
fit(base, torch.optim.SGD(base.parameters(), lr=0.05, momentum=0.9), epochs=10)
FOLDER.mkdir(parents=True, exist_ok=True)
torch.save(base.state_dict(), FOLDER / "base.pth")  # replace by your public or deployed checkpoint
print(f"dense:       {accuracy(base):.1%}, {(FOLDER / 'base.pth').stat().st_size:,} bytes")

for percent in (90, 95):
    model = build()
    model.load_state_dict(base.state_dict())
    config_list = [{"op_types": ["Linear"], "exclude_op_names": ["6"], "sparse_ratio": percent / 100}]
    pruner = LotteryJackpotPruner(model, config_list)
    fit(model, torch.optim.SGD(pruner.score_parameters(), lr=1.0, momentum=0.9), epochs=10)
    metrics = {"test accuracy": accuracy(model)}
    if percent == 90:
        expected = logits(model)
    path = FOLDER / f"{percent}.ticket"
    save_ticket(path, pruner, model, {"metrics": metrics})  # before or after pruner.unwrap_model()
    print(
        f"{percent}% sparse:  {metrics['test accuracy']:.1%}, {path.stat().st_size:,} bytes beside the base"
    )

subprocess.run([sys.executable, __file__, "apply"], check=True)
is_same = torch.equal(torch.load(FOLDER / "logits.pth"), expected)
print(f"a fresh process, of base and ticket: {'the same' if is_same else 'OTHER'} predictions, bit for bit")

box = TicketBox(base)
before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
for name in ("90", "95"):
    box.add(name, load_ticket(FOLDER / f"{name}.ticket"))
for name in ("95", "90"):
    box.use(name)
    print(f"in the box, {name}%: {accuracy(base):.1%}")
box.use(None)
is_back = all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
print(f"and the base is {'back' if is_back else 'LOST'}")
