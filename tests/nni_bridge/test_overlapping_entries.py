"""Entries of a config list that select the same module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ConvNet
from torch import nn

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import ConfigListError, EmptyMatchError, SparseRatioError


def zeros_of(config_list: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of zeros of every weight that is pruned."""
    torch.manual_seed(0)
    masks = LotteryJackpotPruner(ConvNet(), config_list).get_masks()
    return {name: round(1 - float(mask["weight"].mean()), 2) for name, mask in masks.items()}


CONV = {"op_types": ["Conv2d"]}


@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer", "total_sparsity"])
def test_of_legacy_entries_the_later_one_holds(key: str) -> None:
    halves = {"conv1": 0.5, "conv2": 0.5}
    assert zeros_of([{**CONV, "sparsity": 0.5}, {"op_names": ["conv2"], key: 0.75}]) == {
        **halves,
        "conv2": 0.75,
    }
    assert zeros_of([{"op_names": ["conv2"], key: 0.75}, {**CONV, "sparsity": 0.5}]) == halves


def test_a_legacy_exclusion_holds_wherever_it_stands() -> None:
    exclude = {"op_names": ["conv2"], "exclude": True}
    for entries in ([exclude, {**CONV, "sparsity": 0.5}], [{**CONV, "sparsity": 0.5}, exclude]):
        assert zeros_of(entries) == {"conv1": 0.5}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({**CONV, "sparse_ratio": 0.5}, {"op_names": ["conv2"], "sparse_ratio": 0.9}),
        ({"op_names": ["conv2"], "sparse_ratio": 0.9}, {**CONV, "sparse_ratio": 0.5}),
        (
            {**CONV, "sparse_ratio": 0.5},
            {"op_names_re": ["conv.*"], "sparse_ratio": 0.5, "global_group_id": 1},
        ),
        ({**CONV, "sparse_ratio": 0.5}, {**CONV, "target_settings": {"weight": {"sparse_ratio": 0.6}}}),
        ({**CONV, "sparsity": 0.5}, {"op_names": ["conv2"], "sparse_ratio": 0.9}),
    ],
)
def test_entries_that_ask_for_different_things_of_a_layer_are_refused(first: Any, second: Any) -> None:
    model = ConvNet()
    with pytest.raises(ConfigListError, match=r"conv[12]\.weight is selected by two entries") as refusal:
        LotteryJackpotPruner(model, [first, second])
    assert str(first) in str(refusal.value)
    assert str(second) in str(refusal.value)
    assert type(model.conv1) is nn.Conv2d


def test_entries_that_ask_for_the_same_are_as_one() -> None:
    assert zeros_of([{**CONV, "sparse_ratio": 0.5}, {"op_names": ["conv2"], "sparse_ratio": 0.5}]) == {
        "conv1": 0.5,
        "conv2": 0.5,
    }


def test_entries_for_different_targets_of_a_layer_go_together() -> None:
    entries = [
        {"op_names": ["conv2"], "target_names": ["weight"], "sparse_ratio": 0.5},
        {"op_names": ["conv2"], "target_names": ["bias"], "target_settings": {"bias": {"align": {
            "module_name": "conv2", "target_name": "weight", "dims": [0]}}}},
    ]  # fmt: skip
    masks = LotteryJackpotPruner(ConvNet(), entries).get_masks()
    assert masks["conv2"].keys() == {"weight", "bias"}


def test_an_entry_that_selects_nothing_is_shown_as_it_was_written() -> None:
    with pytest.raises(EmptyMatchError, match="'op_types': \\['Conv3d'\\]"):
        LotteryJackpotPruner(ConvNet(), [{"op_types": ["Conv3d"], "sparse_ratio": 0.5}])


@pytest.mark.parametrize(
    "entry",
    [
        {"sparsity": 0.5, "sparse_ratio": 0.9},
        {"sparsity": 0.5, "total_sparsity": 0.9},
        {"sparsity_per_layer": 0.5, "sparsity": 0.5},
        {"total_sparsity": 0.5, "sparse_threshold": 0.1},
        {"sparse_threshold": float("nan")},
        {"sparse_threshold": float("inf")},
        {"sparse_threshold": "0.1"},
        {"sparse_threshold": True},
    ],
    ids=str,
)
def test_ratios_that_contradict_each_other_and_thresholds_that_are_no_numbers_are_refused(entry: Any) -> None:
    with pytest.raises(SparseRatioError):
        LotteryJackpotPruner(ConvNet(), [{**CONV, **entry}])
