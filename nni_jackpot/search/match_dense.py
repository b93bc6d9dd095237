"""Losses without labels: how far the outputs of a sparse network are from those of the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.modules.batches import call_model
from nni_jackpot.runtime.registry import Registry

MatchingLoss = Callable[[Any, Any, Any], Tensor]
"""Loss of the sparse network's output, the dense network's output and the batch."""

MATCHING_LOSSES: Registry[MatchingLoss] = Registry("loss")


class MatchDense:
    """Loss of a batch: the distance between the outputs of a network and those it had before any mask.

    An instance is NNI's ``training_step``, and gives the loss in your own loop. The dense network
    shares the large weights of the model, which a search does not change, and copies all else.

    Parameters
    ----------
    model
        The dense network, before a pruner wraps it.
    loss
        ``"kl"`` for classifiers and language models, ``"cosine"`` for embeddings, ``"mse"``; or a function of
        the sparse output, the dense output and the batch.

    Raises
    ------
    ValueError
        If no loss has the name.

    Examples
    --------
    >>> evaluator = TorchEvaluator(training_func, optimizer, MatchDense(model, "kl"))
    """

    def __init__(self, model: nn.Module, loss: str | MatchingLoss = "kl") -> None:
        self._loss = MATCHING_LOSSES.find(loss) if isinstance(loss, str) else loss
        # Affine parameters of norm layers and biases are copied: some searches tune them.
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if p.dim() > 1}
        self._dense = copy.deepcopy(model, shared).eval()

    def __call__(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the loss of a batch for the model under its masks, a scalar."""
        device = next(model.parameters()).device
        self._dense.to(device)
        with torch.no_grad():
            dense = call_model(self._dense, batch, device)
        return self._loss(call_model(model, batch, device), dense, batch)


@MATCHING_LOSSES.register("kl")
def kl(output: Any, dense: Any, batch: Any) -> Tensor:
    """Return the Kullback-Leibler divergence from the dense network's predictions.

    Parameters
    ----------
    output, dense
        Logits (batch, classes) or (batch, tokens, classes), or outputs of transformers that have them.
    batch
        Its ``attention_mask``, if it has one, says which tokens count.

    Returns
    -------
    Tensor
        The mean over predictions, in nats.
    """
    mine, theirs = (counted(values_of(one), batch).log_softmax(-1) for one in (output, dense))
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


@MATCHING_LOSSES.register("cosine")
def cosine(output: Any, dense: Any, batch: Any) -> Tensor:
    """Return one minus the mean cosine to the dense network's embeddings.

    Parameters
    ----------
    output, dense
        Embeddings (batch, features), or outputs of transformers, whose tokens' mean is the embedding.
    batch
        Its ``attention_mask``, if it has one, says which tokens count.
    """
    return 1 - F.cosine_similarity(embeddings(output, batch), embeddings(dense, batch)).mean()


@MATCHING_LOSSES.register("mse")
def mse(output: Any, dense: Any, batch: Any) -> Tensor:
    """Return the mean squared difference of the outputs, over tokens that count.

    Parameters
    ----------
    output, dense
        Outputs (batch, features) or (batch, tokens, features), or outputs of transformers.
    batch
        Its ``attention_mask``, if it has one, says which tokens count.
    """
    return F.mse_loss(counted(values_of(output), batch), counted(values_of(dense), batch))


def values_of(output: Any) -> Tensor:
    """Return the tensor that an output is about: logits, or the last hidden state.

    Raises
    ------
    TypeError
        If there is none.
    """
    values = output
    if not isinstance(output, Tensor):
        names = "logits", "last_hidden_state"
        found = [getattr(output, name) for name in names if getattr(output, name, None) is not None]
        values = found[0] if found else output[0] if isinstance(output, tuple | list) else None
    if not isinstance(values, Tensor):
        raise TypeError(f"an output of type {type(output).__name__} has no logits and no last_hidden_state")
    return values.float()


def counted(values: Tensor, batch: Any) -> Tensor:
    """Return the values (places, features) of all places that count."""
    mask = _token_mask(batch, values)
    return values.flatten(0, -2) if mask is None else values[mask]


def embeddings(output: Any, batch: Any) -> Tensor:
    """Return embeddings (batch, features): outputs, of tokens the mean over those that count."""
    values = values_of(output)
    if values.dim() == 2:
        return values
    mask = _token_mask(batch, values)
    if mask is None:
        return values.flatten(1, -2).mean(1)
    weights = mask.unsqueeze(-1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)


def _token_mask(batch: Any, values: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or mask.shape != values.shape[:-1]:
        return None
    return mask.to(values.device).bool()
