"""The methods compared in the benchmarks: steps of our search, of training, and of other searches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import nni
import torch
from models import Job, targets_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Optimizer

from nni_jackpot import EdgePopup, LotteryJackpotPruner  # isort: skip  # before NNI's pruners: patches NNI
from nni.compression.pruning import MovementPruner
from nni.compression.utils import TorchEvaluator

TrainingStep = Callable[..., Tensor]
Step = Callable[[], None]
# Calls the given step any number of times; an evaluator's training loop ends when it returns.
Use = Callable[[Step], None]

SPARSE_RATIO = 0.9
CONFIG_LIST = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": SPARSE_RATIO}]


def _train(job: Job, training_step: TrainingStep, optimizer: Optimizer, use: Use) -> None:
    def step() -> None:
        training_step(job.batch, job.model).backward()
        optimizer.step()
        optimizer.zero_grad()

    use(step)


def _sgd(parameters: Any, lr: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)


def floor(job: Job, use: Use) -> None:
    """Run only forward and backward of the dense network, with the gradients that a search needs."""
    job.model.requires_grad_(False)
    for module in targets_of(job.model):
        module.weight.requires_grad_(True)

    def step() -> None:
        job.training_step(job.batch, job.model).backward()
        job.model.zero_grad()

    use(step)


def dense(job: Job, use: Use) -> None:
    """Train all weights with the search's optimizer."""
    _train(job, job.training_step, _sgd(job.model.parameters(), 1e-3), use)


class _GetSubnet(torch.autograd.Function):
    """The mask as in the authors' code for edge-popup: a full sort in every forward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparse_ratio: float) -> Tensor:
        mask = scores.clone()
        order = scores.flatten().sort().indices
        n_zeros = int(sparse_ratio * scores.numel())
        mask.view(-1)[order[:n_zeros]] = 0
        mask.view(-1)[order[n_zeros:]] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _EdgePopup(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(weight.detach().abs().contiguous())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _GetSubnet.apply(self.scores, SPARSE_RATIO)


def reference(job: Job, use: Use) -> None:
    """Search by plain edge-popup with the same optimizer; only the computation of the masks differs."""
    job.model.requires_grad_(False)
    scores = []
    for module in targets_of(job.model):
        popup = _EdgePopup(module.weight)
        parametrize.register_parametrization(module, "weight", popup)
        scores.append(popup.scores)
    _train(job, job.training_step, _sgd(scores, 0.1), use)


def _through_evaluator(make: Callable[..., Any], job: Job, use: Use, **options: Any) -> None:
    def training_func(model: nn.Module, optimizer: Optimizer, step: TrainingStep, *lengths: Any) -> None:
        _train(job, step, optimizer, use)

    optimizer = nni.trace(SGD)(job.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    evaluator = TorchEvaluator(training_func, optimizer, job.training_step)
    make(job.model, CONFIG_LIST, evaluator).compress(max_steps=100_000, max_epochs=None, **options)


class _FineMovementPruner(MovementPruner):
    def _set_default_sparse_granularity(self, target_space: Any) -> None:
        """Prune single weights, as NNI's LevelPruner does."""


def movement(job: Job, use: Use) -> None:
    """Search by NNI's closest pruner: it trains scores and weights together, with new masks at every step."""
    _through_evaluator(
        lambda *given: _FineMovementPruner(*given, warmup_step=0, cooldown_begin_step=1), job, use
    )


def paper(job: Job, use: Use) -> None:
    """Search by the paper's recipe, as `reference` does, through NNI's evaluator."""
    # A search compares masks in few steps, most of them early. The benchmark times the other steps.
    _through_evaluator(partial(LotteryJackpotPruner, method=EdgePopup.paper()), job, use, held_out=0)


def default(job: Job, use: Use) -> None:
    """Search by the default recipe, in its phase with soft masks, through NNI's evaluator."""
    _through_evaluator(LotteryJackpotPruner, job, use, held_out=0)


def own_loop(job: Job, use: Use) -> None:
    """Search by the default recipe, in its phase with soft masks, in a loop without NNI."""
    search = LotteryJackpotPruner(job.model, CONFIG_LIST).begin(total_steps=100_000)

    def step() -> None:
        loss = job.training_step(job.batch, job.model)
        loss.backward()
        search.step(loss)

    use(step)


FLOOR = "forward and backward"
CONTESTANTS: dict[str, Callable[[Job, Use], None]] = {
    FLOOR: floor,
    "dense training": dense,
    "plain edge-popup": reference,
    "NNI's MovementPruner": movement,
    "paper's recipe": paper,
    "default recipe": default,
    "default recipe, own loop": own_loop,
}
