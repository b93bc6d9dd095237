"""Evidence of the dense network for pruning criteria, from the training loop of NNI's evaluator.

The user's loop trains the model; here it runs without any lasting change to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from nni.compression.utils import Evaluator, LightningEvaluator
from torch import Tensor, nn

from nni_jackpot.errors import CalibrationError, ConfigListError
from nni_jackpot.masking.activations.input_statistics import CollectedInputs, InputWatcher
from nni_jackpot.masking.activations.layers import KINDS, is_matrix_layer
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.runtime.resume import same_random_states


def losses_of(
    evaluator: Evaluator,
    model: nn.Module,
    param_names_map: dict[str, str],
    weights: Iterable[Tensor],
    batches: int,
) -> Losses:
    """Return a function that runs training steps and passes every loss, with its graph, to a visitor.

    Each call runs the evaluator's own loop for ``batches`` calls of the training step; gradient accumulation
    does not change the number of losses. Afterwards, even after an error, the model is restored (parameters,
    gradients, buffers, training flags, devices), and so are the random states of PyTorch, NumPy and Python.
    Every call therefore sees the same batches, unless the loop has its own generator or keeps an iterator.

    Parameters
    ----------
    evaluator
        NNI's evaluator, not bound to a model.
    model
        The wrapped model.
    param_names_map
        Original names of parameters to their names in the wrapped model (NNI's ``_get_param_names_map``).
    weights
        Parameters of ``model`` that need gradients; all other parameters count as constants. With none, the
        losses have no graph.
    batches
        Number of losses, at least 1. A loss that is not a scalar is replaced by its mean.

    Returns
    -------
    Losses
        A function of the visitor. Errors of the visitor and the loop propagate. It raises CalibrationError if
        the loop ends before ``batches`` steps, or a loss depends on none of ``weights``.
    """
    if batches < 1:
        raise ValueError(f"batches must be positive, got {batches}")
    weights = list(weights)

    def losses(visit: Callable[[Tensor], None]) -> None:
        visited = 0

        def show(loss: Tensor, batch: Any) -> Tensor:
            nonlocal visited
            if not torch.is_grad_enabled():  # an evaluation within the training loop
                return loss
            if visited < batches:
                if weights and not loss.requires_grad:
                    raise CalibrationError("the training step's loss depends on none of the weights to prune")
                visited += 1
                with torch.autocast(loss.device.type, enabled=False):  # autocast is for forwards only
                    visit(loss.mean())
            return loss.detach() + 0 * dummy.sum().to(loss)

        with same_random_states(), _unchanged(model):
            model.requires_grad_(False)
            # DistributedDataParallel, which is made again here, refuses a model without one.
            for weight in weights or [min(model.parameters(), key=Tensor.numel)]:
                weight.requires_grad_(True)
            # The only trainable parameter: clipping, a gradient scaler and the optimizer need a gradient. It
            # is a matrix, because some optimizers accept nothing else.
            device = next(iter((*weights, *model.parameters()))).device
            dummy = nn.Parameter(torch.zeros(1, 1, device=device))
            # Mapped to these names, no parameter of the model gets into the evaluator's optimizers.
            evaluator.bind_model(model, dict.fromkeys(param_names_map, ""))
            if not weights:
                model.requires_grad_(False)
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
                f"the evaluator's training loop ran {visited} of {batches} batches: let it run until "
                "max_steps, or give the criterion fewer batches"
            )

    return losses


def evidence_of(
    needs: str,
    weights: Mapping[MaskedParameter, Tensor],
    evaluator: Evaluator,
    model: nn.Module,
    param_names_map: dict[str, str],
    batches: int,
) -> Losses | CollectedInputs[MaskedParameter]:
    """Return the evidence about weights that a criterion needs, from training steps of an evaluator.

    Activations and Hessians are those of the forwards of the training steps, in the mode that the training
    loop sets; no gradient is computed for them.

    Parameters
    ----------
    needs
        The kind of evidence: ``"losses"``, ``"activations"`` or ``"hessians"``.
    weights
        The weights by parameter.
    evaluator, model, param_names_map, batches
        As for `losses_of`.

    Raises
    ------
    ConfigListError
        If a weight has no layer whose inputs are known (`layers_of`).
    """
    leaves = weights.values() if needs == "losses" else ()
    losses = losses_of(evaluator, model, param_names_map, leaves, batches)
    if needs == "losses":
        return losses

    def run(watcher: InputWatcher[MaskedParameter]) -> None:
        left = batches

        def visit(_: Tensor) -> None:
            nonlocal left
            left -= 1
            if not left:  # the loop may run more steps than it was asked for
                watcher.stop()

        losses(visit)

    layers = {parameter: layers_of(parameter) for parameter in weights}
    return CollectedInputs(weights, layers, run, gram=needs == "hessians")


def layers_of(parameter: MaskedParameter) -> list[nn.Module]:
    """Return the layers that multiply their input by a weight, several if the weight is tied.

    Raises
    ------
    ConfigListError
        If a module that holds the parameter is another kind of layer.
    """
    layers = []
    for module, name in parameter.space._wrapper.holders[parameter.name]:  # type: ignore[attr-defined]
        if name != "weight" or not is_matrix_layer(module):
            raise ConfigListError(
                f"{parameter} is {name!r} of a {type(module).__name__}, and only weights of {KINDS} are "
                "multiplied by inputs: start from 'magnitude', or leave it out"
            )
        layers.append(module)
    return layers


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Clear gradients for the block, then restore the model's tensors, values, gradients and flags."""
    modules = [(module, module._buffers.copy()) for module in model.modules()]
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    # By storage, since buffers can be views: a wrapped module's weight is a view of its wrapper's parameter.
    tensors = (t for t in chain(model.parameters(), model.buffers()) if t.layout is torch.strided)
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors)}
    values = [(storage, storage.clone()) for storage in storages.values()]
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        with restored_modes(model):
            yield
    finally:
        for module, buffers in modules:
            module._buffers.clear()  # moving the model replaces the tensors
            module._buffers.update(buffers)
        for parameter, data, requires_grad, gradient in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for storage, value in values:
            storage.copy_(value)
