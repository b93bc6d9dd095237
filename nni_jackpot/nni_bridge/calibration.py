"""Losses of the dense network, with their graphs, through the training loop of NNI's evaluator.

The loop is the user's, made to train. Here it may run all it likes, and afterwards nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from nni.compression.utils import Evaluator, LightningEvaluator
from torch import Tensor, nn

from nni_jackpot.errors import CalibrationError
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.runtime.resume import same_random_states


def losses_of(
    evaluator: Evaluator,
    model: nn.Module,
    param_names_map: dict[str, str],
    weights: Iterable[Tensor],
    batches: int,
) -> Losses:
    """Return a function that runs training steps and hands every loss, with its graph, to a visitor.

    Each call runs the evaluator's own loop for ``batches`` steps. A step is what the loop calls the training
    step for, so gradient accumulation does not change the number of losses. Afterwards, also after an error,
    the model is what it was: parameters, gradients, buffers, training flags, devices; and so are the random
    states of PyTorch, NumPy and Python, by which every call sees the same batches (unless the loop draws
    them from a generator of its own, or from an iterator that it keeps).

    Parameters
    ----------
    evaluator
        NNI's evaluator, bound to no model.
    model
        The wrapped model.
    param_names_map
        Names of the wrapped model's parameters by those they had before (NNI's ``_get_param_names_map``).
    weights
        Parameters of ``model`` that the graphs lead to; all other parameters count as constants.
    batches
        How many losses, at least 1. A loss that is not a scalar is averaged to one.

    Returns
    -------
    Losses
        Takes the visitor. What the visitor raises, or the loop, comes through. Raises CalibrationError if the
        loop ends before ``batches`` steps, or a loss depends on none of ``weights``.
    """
    if batches < 1:
        raise ValueError(f"batches must be positive, got {batches}")
    weights = list(weights)

    def losses(visit: Callable[[Tensor], None]) -> None:
        visited = 0

        def show(loss: Tensor, batch: Any) -> Tensor:
            nonlocal visited
            if not torch.is_grad_enabled():  # an evaluation amid the training
                return loss
            if visited < batches:
                if not loss.requires_grad:
                    raise CalibrationError("the training step's loss depends on none of the weights to prune")
                visited += 1
                with torch.autocast(loss.device.type, enabled=False):  # it is for forwards only
                    visit(loss.mean())
            return loss.detach() + 0 * dummy.sum().to(loss)

        with same_random_states(), _unchanged(model):
            model.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            # All that the loop may train, as it has to train something: clipping, a gradient scaler and the
            # optimizer itself want a gradient. A matrix, since there are optimizers for nothing else.
            dummy = nn.Parameter(torch.zeros(1, 1, device=weights[0].device))
            # With these names the evaluator finds no parameter of the model for its optimizers.
            evaluator.bind_model(model, dict.fromkeys(param_names_map, ""))
            try:
                evaluator.patch_optim_param_group({"": [dummy]})
                evaluator.patch_loss(show)
                evaluator.train(max_steps=batches)
            finally:
                if isinstance(evaluator, LightningEvaluator):
                    evaluator.model.trainer = None  # as NNI does after a run without errors
                evaluator.unbind_model()
        if visited < batches:
            raise CalibrationError(
                f"the evaluator's training loop ran {visited} of {batches} batches: it has to run until "
                "max_steps, or take fewer batches for the criterion"
            )

    return losses


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Leave with the model as it was: the same tensors, values, gradients and flags; no gradients inside."""
    modules = [(module, module.training, module._buffers.copy()) for module in model.modules()]
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    # By storage, because buffers are views: a wrapped module's weight is one of its wrapper's parameter.
    tensors = (t for t in chain(model.parameters(), model.buffers()) if t.layout is torch.strided)
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors)}
    values = [(storage, storage.clone()) for storage in storages.values()]
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()  # a loop that moves the model puts other tensors there
            module._buffers.update(buffers)
        for parameter, data, requires_grad, gradient in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for storage, value in values:
            storage.copy_(value)
