"""A jackpot in one call, for a model and batches in memory or a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.masks import Masks
from nni_jackpot.modules.layouts import searched_layers
from nni_jackpot.pruner import LotteryJackpotPruner

# Batches by whose loss the search chooses among the masks that it has had.
_SAMPLE = 4


def find_jackpot(
    model: nn.Module,
    train_batches: Collection[Any] | Iterable[Any],
    *,
    sparsity: float = 0.9,
    epochs: int = 3,
    loss: Callable[[Any, nn.Module], Tensor] | None = None,
    config_list: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Masks:
    """Find a lottery jackpot in a pre-trained model, whose weights are unchanged.

    Parameters
    ----------
    model
        The model, on the device where it computes. Its norm statistics end as those of the found masks;
        nothing else is changed.
    train_batches
        Batches with a length, such as a list or a ``DataLoader``; one pass is an epoch.
    sparsity
        Share of zeros among all weights of convolutions and linear layers together, but the last linear
        layer, which stays dense.
    epochs
        Passes over the batches.
    loss
        Returns the loss of ``(batch, model)``, as NNI's ``training_step`` does, or `MatchDense`. The
        cross-entropy of batches ``(inputs, labels)`` by default.
    config_list
        NNI's config list, in place of ``sparsity``.
    **options
        Of `LotteryJackpotPruner`.

    Returns
    -------
    Masks
        The masks in NNI's form. `apply_masks` puts their zeros into the model, and `save_ticket` writes them.

    Raises
    ------
    JackpotError
        One of its kinds, as `LotteryJackpotPruner` raises them; the model is then unchanged.
    ValueError
        If the batches have no length, or an option is not valid.

    Examples
    --------
    >>> masks = find_jackpot(model, train_loader, sparsity=0.9, epochs=3)
    >>> apply_masks(model, masks)
    """
    try:
        steps = epochs * len(train_batches)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("find_jackpot(): train_batches must have a length, like a list") from None
    if config_list is None:
        names = [*searched_layers(model)]
        config_list = [{"op_names": names, "sparse_ratio": sparsity, "global_group_id": 0}]
    loss_of = loss or _cross_entropy
    sample = list(islice(train_batches, _SAMPLE))
    was_training = model.training
    pruner = LotteryJackpotPruner(model, config_list, **options)
    try:
        search = pruner.begin(steps, lambda: torch.stack([loss_of(b, model) for b in sample]).mean())
        for _ in range(epochs):
            model.train()
            for batch in train_batches:
                found = loss_of(batch, model)
                found.backward()
                search.step(found.detach())
        return search.finish(norm_batches=train_batches)
    finally:
        pruner.unwrap_model()
        model.train(was_training)


def _cross_entropy(batch: Any, model: nn.Module) -> Tensor:
    inputs, labels = batch
    device = next(model.parameters()).device
    return F.cross_entropy(model(inputs.to(device)), labels.to(device))
