"""The old spelling of a pruner's options, for one release."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator, same

from nni_jackpot import EdgePopup, LotteryJackpotPruner, Supermask

CONFIG_LIST = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"recipe": "jackpot"}, {}, "method=EdgePopup()"),
    (
        {"recipe": "paper", "lr": 2.0, "swap_limit": 0.1},
        {"method": EdgePopup.paper(lr=2.0, swap_limit=0.1)},
        "method=EdgePopup.paper(lr=2.0, swap_limit=0.1)",
    ),
    (
        {"growth": 0.25, "hardening": 0.5, "temperature": 1.0, "momentum": 0.5, "weight_decay": 0.1},
        {"method": EdgePopup(ramp_end=0.25, anneal_end=0.5, temperature=1.0, momentum=0.5, weight_decay=0.1)},
        "ramp_end=0.25",
    ),
    (
        {"kept_score": 2.0, "pruned_score": 1.0},
        {"method": EdgePopup(kept_score=2.0, pruned_score=1.0)},
        "method=EdgePopup(kept_score=2.0, pruned_score=1.0)",
    ),
    (
        {"method": "supermask", "recipe": "paper", "lr": 3.0},
        {"method": Supermask.paper(lr=3.0)},
        "method=Supermask.paper(lr=3.0)",
    ),
    ({"adapt_norm": False}, {"norm": "freeze"}, "norm='freeze'"),
]


@pytest.mark.parametrize(("old", "new", "shown"), SPELLINGS, ids=[shown for _, _, shown in SPELLINGS])
def test_old_keywords_warn_and_give_the_same_masks(
    old: dict[str, Any], new: dict[str, Any], shown: str, model: ConvNet, batches: Batches
) -> None:
    def masks(options: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        own = copy.deepcopy(model)
        pruner = LotteryJackpotPruner(own, CONFIG_LIST, make_evaluator(own, batches), **options)
        return pruner.compress(max_steps=12)[1]

    with pytest.warns(DeprecationWarning, match="will be removed in the next release") as caught:
        before = masks(old)
    assert any(shown in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    assert same(before, masks(new))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "soup"}, "recipe must be one of default, paper, got 'soup'"),
        ({"method": "supermask", "growth": 0.5}, "ramp_end is not a setting of supermask"),
        ({"method": "supermask", "hardening": 0.5}, "anneal_end is not a setting of supermask"),
        (
            {"method": "supermask", "swap_limit": 0.1, "recipe": "paper"},
            "swap_limit is not a setting of supermask",
        ),
        ({"method": "supermask", "kept_score": 3.0}, "kept_score is not a setting of supermask"),
        ({"method": "supermask", "pruned_score": 0.5}, "pruned_score is not a setting of supermask"),
    ],
)
def test_what_no_method_has_is_refused(model: ConvNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LotteryJackpotPruner(model, CONFIG_LIST, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_settings_belong_to_the_method(model: ConvNet) -> None:
    with pytest.raises(ValueError, match=r"lr: give settings to the method, EdgePopup"):
        LotteryJackpotPruner(model, CONFIG_LIST, method=EdgePopup(), lr=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        LotteryJackpotPruner(model, CONFIG_LIST, learning_rate=1.0)
    with pytest.raises(ValueError, match="norm must be one of adapt, freeze, tune, got 'thaw'"):
        LotteryJackpotPruner(model, CONFIG_LIST, norm="thaw")


def test_a_criterion_and_a_budget_may_be_callables(model: ConvNet) -> None:
    def smallest(weights: Any) -> Any:
        return {key: -weight.detach().abs() for key, weight in weights.items()}

    def half(units: Any, importance: Any) -> Any:
        return {key: unit.grains // 2 for key, unit in units.items()}

    pruner = LotteryJackpotPruner(model, CONFIG_LIST, init=smallest, budget=half)
    mask = pruner.get_masks()["conv2"]["weight"]
    assert mask is not None
    dense = model.conv2._nni_wrapper.weight.abs()
    assert int(mask.sum()) == mask.numel() // 2
    assert dense[mask == 1].max() <= dense[mask == 0].min()
