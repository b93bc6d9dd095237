"""What is found where the best mask is known: it, by every recipe, method and granularity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_evaluator
from known_optimum import BEST, CONFIG_LIST, batches, layer, three_of_ten, training_step
from torch import Tensor

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Method, Supermask


def mask_of(pruner: LotteryJackpotPruner) -> Tensor:
    return pruner.get_masks()["0"]["weight"].bool()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_own_loop_finds_the_best_mask(optimizer: type[torch.optim.Optimizer]) -> None:
    model = layer()
    pruner = LotteryJackpotPruner(model, CONFIG_LIST)
    assert not (mask_of(pruner) & BEST).any()
    # An epoch moves scores that begin 0.05 apart towards each other: by 0.05 under SGD, more under Adam.
    updates = optimizer(pruner.score_parameters(), lr=0.01)
    for _ in range(10):
        for batch in batches():
            training_step(batch, model).backward()
            updates.step()
            updates.zero_grad()
    assert torch.equal(mask_of(pruner), BEST)


@pytest.mark.parametrize("length", [(24, None), (None, 6)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": EdgePopup(ramp_end=0.0)},
        {"method": EdgePopup(anneal_end=0.0, temperature=0.0)},
        {"init": "random"},
        {"method": EdgePopup.paper()},
        {"method": EdgePopup.paper(swap_limit=0.1)},
        {"method": Supermask.paper()},
        {"method": Supermask(lr=3.0)},
    ],
    ids=[
        *("defaults", "without ramp", "without soft masks", "random", "paper", "limited swaps"),
        *("supermask, paper", "supermask"),
    ],
)
def test_a_search_finds_the_best_mask(options: dict[str, Any], length: tuple) -> None:
    torch.manual_seed(0)  # of random masks and samples
    model = layer()
    evaluator = make_evaluator(model, batches(), training_step)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, evaluator, **options)
    assert not torch.equal(mask_of(pruner), BEST)
    pruner.compress(*length)
    assert torch.equal(mask_of(pruner), BEST)


@pytest.mark.parametrize(
    "method", [EdgePopup(), EdgePopup.paper(), Supermask(lr=3.0)], ids=["defaults", "paper", "supermask"]
)
@pytest.mark.parametrize(
    ("entry", "best"),
    [
        ({"sparse_ratio": 0.7, "granularity": "out_channel"}, three_of_ten(1, 20)),
        ({"sparse_ratio": 0.7, "granularity": "in_channel"}, three_of_ten(24, 1)),
        ({"sparse_ratio": 0.7, "granularity": [4, 5]}, three_of_ten(4, 5)),
        ({"sparse_pattern": "2:4"}, (torch.arange(480) % 2 == 0).view(24, 20)),
    ],
    ids=["out_channel", "in_channel", "blocks", "2:4"],
)
def test_a_search_finds_the_best_grains(entry: dict[str, Any], best: Tensor, method: Method) -> None:
    torch.manual_seed(0)
    model = layer(best)
    evaluator = make_evaluator(model, batches(best), training_step)
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], **entry}], evaluator, method=method)
    assert not torch.equal(mask_of(pruner), best)
    pruner.compress(24, None)
    assert torch.equal(mask_of(pruner), best)
