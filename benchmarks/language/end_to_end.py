"""A search of the whole network by the pruner, from given masks: a method to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Method, Patterns
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batches import call_model
from nni_jackpot.search.blockwise.mask_training import order_of

SEARCHES: dict[str, Callable[[float], Method]] = {
    "edge_popup": lambda lr: EdgePopup(
        lr=lr, weight_decay=0, ramp_end=0, temperature=0, anneal_end=0, reallocate=False
    ),
    "patterns": lambda lr: Patterns(lr=lr),
}


def end_to_end(
    model: nn.Module,
    batches: Sequence[Any],
    masks: Masks,
    loss: Callable[[Any, Any, Any], Tensor],
    method: Method,
    pattern: str,
    steps: int,
    seed: int,
) -> Masks:
    """Return the masks of a search without labels, of one batch a step."""
    sparse = copy.deepcopy(model).train()
    for module in sparse.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(seed)
    config_list = [{"op_names": list(masks), "sparse_pattern": pattern}]
    search = LotteryJackpotPruner(sparse, config_list, init=masks, method=method).begin(steps)
    for i in order_of(range(len(batches)), steps, seed):
        with torch.no_grad():
            dense = call_model(model, batches[i])
        value = loss(call_model(sparse, batches[i]), dense, batches[i])
        value.backward()
        search.step(value)
    return search.finish()
