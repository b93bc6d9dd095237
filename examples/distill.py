"""Search a jackpot without labels: the dense network is the teacher, through NNI's distiller.

Run it with: python examples/distill.py [SEED]
"""

import copy
import sys

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.experiment.models.resnet import ResNet

import nni
import torch
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch.nn import functional as F


torch.manual_seed(int(sys.argv[1]) if sys.argv[1:] else 0)
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)
epochs = 10


def with_labels(batch, model):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def without_labels(batch, model):
    images, _ = batch
    return model(images).mean()  # a forward for the distiller to observe; the distiller adds the loss


def training_func(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
    for _ in range(max_epochs):
        model.train()
        for at in torch.randperm(1400).split(64):
            loss = training_step((images[train][at], labels[train][at]), model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def evaluator(model, training_step):
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)  # drives the loop, gets no gradients
    return TorchEvaluator(training_func, optimizer, training_step)


@torch.no_grad()
def report(name, model):
    right = model.eval()(images[test]).argmax(1) == labels[test]
    print(f"{name + ':':40}{right.float().mean():7.2%}")


# "Pre-trained": in your work, the checkpoint you load.
dense = ResNet(depth=8, width=16, num_classes=10, in_channels=1)
training_func(dense, torch.optim.Adam(dense.parameters(), lr=3e-3), with_labels, max_epochs=8)
report("dense", dense)

config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 0}]

model = copy.deepcopy(dense)
pruner = LotteryJackpotPruner(model, config_list)
pruner.reestimate_norm(images[train].split(200))
report("magnitude mask, norm re-estimated", model)

model = copy.deepcopy(dense)
pruner = LotteryJackpotPruner(model, config_list, evaluator(model, with_labels))
pruner.compress(max_steps=None, max_epochs=epochs)
pruner.reestimate_norm(images[train].split(200))  # the search ends with statistics of soft masks
report("jackpot found by labels", model)

model = copy.deepcopy(dense)
distiller = DynamicLayerwiseDistiller(
    model,
    [{"op_names": ["fc"], "apply_method": "kl"}],  # the logits
    evaluator(model, without_labels),
    teacher_model=dense.eval(),
    teacher_predict=lambda batch, teacher: teacher(batch[0]),
    origin_loss_lambda=0.0,  # ignore the training step's own loss
)
pruner = LotteryJackpotPruner.from_compressor(distiller, config_list)
pruner.compress(max_steps=None, max_epochs=epochs)
pruner.reestimate_norm(images[train].split(200))
report("jackpot found without labels", model)
