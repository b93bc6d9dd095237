from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import honours, refuses
from torch import nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import (
    ConfigListError,
    EmptyMatchError,
    NothingKeptError,
    SparseRatioError,
    TargetWithoutParametersError,
    WeightDtypeError,
)


def zeros(model: nn.Module, config_list: list[dict[str, Any]]) -> dict[str, int]:
    """Return the zeros of every weight that the config list prunes."""
    masks = LotteryJackpotPruner(model, config_list).get_masks()
    return {name: int((mask["weight"] == 0).sum()) for name, mask in masks.items()}


def half(module: nn.Module, ratio: float = 0.5) -> int:
    return int(ratio * module.weight.numel())


@pytest.mark.parametrize(
    ("config_list", "names"),
    [
        honours("op_types", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], ["conv1", "conv2"]),
        honours("op_names", [{"op_names": ["conv2", "fc"], "sparse_ratio": 0.5}], ["conv2", "fc"]),
        honours("op_names_re", [{"op_names_re": ["conv.*"], "exclude_op_names": ["conv1"], "sparse_ratio": 0.5}], ["conv2"]),
        honours("exclude_op_types", [{"op_types": ["Conv2d", "Linear"], "exclude_op_types": ["Linear"], "sparse_ratio": 0.5}], ["conv1", "conv2"]),
        honours("exclude_op_names_re", [{"op_types": ["Conv2d"], "exclude_op_names_re": ["conv1"], "sparse_ratio": 0.5}], ["conv2"]),
        honours("target_names: weight", [{"op_types": ["Conv2d"], "target_names": ["weight"], "sparse_ratio": 0.5}], ["conv1", "conv2"]),
        honours("target_settings", [{"op_types": ["Conv2d"], "target_settings": {"weight": {"sparse_ratio": 0.5}}}], ["conv1", "conv2"]),
        honours("sparsity", [{"op_types": ["Conv2d"], "sparsity": 0.5}], ["conv1", "conv2"]),
        honours("sparsity_per_layer", [{"op_types": ["Conv2d"], "sparsity_per_layer": 0.5}], ["conv1", "conv2"]),
        honours("op_partial_names", [{"op_partial_names": ["conv"], "sparsity": 0.5}], ["conv1", "conv2"]),
        honours("exclude", [{"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}, {"op_names": ["fc"], "exclude": True}], ["conv1", "conv2"]),
        ([{"op_names": ["fc"], "exclude": True}, {"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}], ["conv1", "conv2"]),
        ([{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}, {"op_names": ["fc"], "exclude": True}], ["conv1", "conv2"]),
        honours(
            "exclude_op_names",
            [
                {"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["conv1"], "sparsity": 0.5},
                {"op_names": ["fc"], "exclude": True},
            ],
            ["conv2"],
        ),
    ],
)  # fmt: skip
def test_selection(model: nn.Module, config_list: list[dict[str, Any]], names: list[str]) -> None:
    expected = {name: half(getattr(model, name)) for name in names}
    assert zeros(model, config_list) == expected


@pytest.mark.honours("sparse_ratio")
def test_each_target_has_its_own_ratio(model: nn.Module) -> None:
    config_list = [{"op_names": ["conv1"], "sparse_ratio": 0.3}, {"op_names": ["conv2"], "sparse_ratio": 0.9}]
    expected = {"conv1": half(model.conv1, 0.3), "conv2": half(model.conv2, 0.9)}
    assert zeros(model, config_list) == expected


@pytest.mark.honours("target_settings, before what the entry says")
@pytest.mark.parametrize("key", ["sparse_ratio", "sparse_threshold"])
def test_a_target_s_own_settings_go_before_those_of_its_entry(model: nn.Module, key: str) -> None:
    entry = {"op_names": ["conv2"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.6, "internal_metric_block": 2}
    own = {"sparse_ratio": 0.75, "max_sparse_ratio": None, "internal_metric_block": None}
    if key == "sparse_threshold":
        own = {**own, "sparse_ratio": None, "sparse_threshold": 0.05}
    pruner = LotteryJackpotPruner(model, [{**entry, "target_settings": {"weight": own}}])
    pruned = pruner.get_masks()["conv2"]["weight"] == 0
    below = model.conv2._nni_wrapper.weight.abs() < 0.05
    assert int(pruned.sum()) == (648 if key == "sparse_ratio" else int(below.sum()))
    halves = pruned.reshape(2, -1).sum(1).tolist()
    assert halves[0] != halves[1]


@pytest.mark.honours("sparse_ratio, of each target")
def test_every_target_of_an_entry_has_its_own_ratio(model: nn.Module) -> None:
    bias = {"sparse_ratio": 0.25}
    config_list = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "target_settings": {"bias": bias}}]
    masks = LotteryJackpotPruner(model, config_list).get_masks()["conv2"]
    assert [int((masks[name] == 0).sum()) for name in ("weight", "bias")] == [432, 3]


def test_none_is_no_wish(model: nn.Module) -> None:
    # as NNI's documentation spells its defaults out
    none = ("max_sparse_ratio", "min_sparse_ratio", "sparse_threshold", "global_group_id")
    none = (*none, "dependency_group_id", "internal_metric_block")
    weight = {"sparse_ratio": 0.5, **dict.fromkeys(none), "granularity": "default", "apply_method": "mul"}
    align = {"module_name": None, "target_name": "weight", "dims": [0]}
    settings = {"weight": weight, "bias": {"align": align, "apply_method": "mul"}}
    names = ["weight", "bias"]
    config_list = [{"op_names": ["conv2"], "target_names": names, "target_settings": settings}]
    assert LotteryJackpotPruner(model, config_list).get_masks()["conv2"]["weight"].sum() == 432


def test_integer_zero_is_a_ratio(model: nn.Module) -> None:
    assert zeros(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0}]) == {"conv1": 0, "conv2": 0}


def test_bias_stays_whole_unless_it_has_a_ratio(model: nn.Module) -> None:
    masks = LotteryJackpotPruner(model, [{"op_names": ["conv2"], "sparse_ratio": 0.9}]).get_masks()
    assert masks["conv2"]["bias"].all()


@pytest.mark.honours("target_names: bias")
def test_bias_with_a_ratio_of_its_own(model: nn.Module) -> None:
    bias = {"sparse_ratio": 0.5}
    config_list = [{"op_names": ["conv2"], "target_names": ["bias"], "target_settings": {"bias": bias}}]
    pruner = LotteryJackpotPruner(model, config_list)
    assert pruner.get_masks()["conv2"]["bias"].sum() == 6
    assert [score.shape for score in pruner.score_parameters()] == [(12,)]


@pytest.mark.parametrize(
    "key", [honours("global_group_id", "sparse_ratio"), honours("total_sparsity", "total_sparsity")]
)
def test_global_group(model: nn.Module, key: str) -> None:
    weights = [model.conv1.weight, model.conv2.weight]
    entry: dict[str, Any] = {"op_types": ["Conv2d"], key: 0.8}
    if key == "sparse_ratio":
        entry["global_group_id"] = "all"
    found = zeros(model, [entry])
    flat = torch.cat([w.detach().abs().flatten() for w in weights])
    threshold = flat.sort().values[int(0.8 * flat.numel())]
    assert found == {f"conv{i + 1}": int((w.detach().abs() < threshold).sum()) for i, w in enumerate(weights)}
    assert sum(found.values()) == int(0.8 * flat.numel())
    assert found["conv1"] != half(model.conv1, 0.8)


@pytest.mark.honours("max_sparsity_per_layer")
@pytest.mark.parametrize("key", ["sparsity", "total_sparsity"])
def test_legacy_bound(model: nn.Module, key: str) -> None:
    names = ["conv2"] if key == "sparsity" else ["conv1", "conv2"]
    found = zeros(model, [{"op_names": names, key: 0.8, "max_sparsity_per_layer": 0.6}])
    assert found == {name: half(getattr(model, name), 0.6) for name in names}


def test_the_list_is_not_changed(model: nn.Module) -> None:
    config_list = [{"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}, {"op_names": ["fc"], "exclude": True}]
    LotteryJackpotPruner(model, config_list)
    assert config_list == [
        {"op_types": ["Conv2d", "Linear"], "sparsity": 0.5},
        {"op_names": ["fc"], "exclude": True},
    ]


CONV = {"op_types": ["Conv2d"]}
CONV2 = {"op_names": ["conv2"], "sparse_ratio": 0.5}


@pytest.mark.parametrize(
    ("config_list", "error", "words"),
    [
        ([], EmptyMatchError, "selects nothing"),
        ([{"op_types": ["Conv1d"], "sparse_ratio": 0.5}], EmptyMatchError, "BatchNorm2d, Conv2d, Linear"),
        ([{**CONV, "sparse_ratio": 0.5}, {"op_names": ["typo"], "sparse_ratio": 0.5}], EmptyMatchError, "typo"),
        ([{"op_names": ["fc"], "exclude": True}], EmptyMatchError, "no entry that prunes"),
        refuses("sparse_ratio, outside [0, 1)", [{**CONV, "sparse_ratio": 1.0}], SparseRatioError, r"\[0, 1\), got 1.0"),
        ([{**CONV, "sparse_ratio": -0.1}], SparseRatioError, r"\[0, 1\), got -0.1"),
        ([{**CONV, "sparse_ratio": 90}], SparseRatioError, "for 90 percent write 0.9"),
        ([{**CONV, "sparse_ratio": float("nan")}], SparseRatioError, "got nan"),
        ([{**CONV, "sparse_ratio": "0.9"}], SparseRatioError, "must be a number"),
        ([{**CONV, "sparse_ratio": True}], SparseRatioError, "must be a number"),
        ([{**CONV, "sparsity": 1.5}], SparseRatioError, r"sparsity must lie in \[0, 1\)"),
        ([{**CONV, "target_settings": {"weight": {"sparse_ratio": 2}}}], SparseRatioError, "got 2"),
        ([CONV], SparseRatioError, "no sparse_ratio"),
        ([{**CONV, "sparse_threshold": 1e9}], NothingKeptError, "would be kept"),
        ([{**CONV, "min_sparse_ratio": 0.1}], SparseRatioError, "min_sparse_ratio.* but no sparse_ratio"),
        ([{**CONV, "sparse_ratio": 0.5, "min_sparse_ratio": 0.7, "max_sparse_ratio": 0.6}], SparseRatioError, "0.7 is above"),
        ([{**CONV, "sparse_ratios": 0.5}], ConfigListError, "sparse_ratios"),
        ([{**CONV2, "target_settings": {"weight": {"sparse_ratios": 0.5}}}], ConfigListError, "Key 'weight' error:\nWrong key 'sparse_ratios'"),
        ([{**CONV2, "target_settings": ["weight"]}], ConfigListError, r"must be a dict of dicts.*, got \['weight'\]"),
        ([{**CONV2, "target_settings": {"weight": 0.5}}], ConfigListError, r"must be a dict of dicts.*, got \{'weight': 0.5\}"),
        ([{**CONV2, "target_settings": {"weight": {"sparse_ratio": None}}}], SparseRatioError, "gives conv2 no sparse_ratio"),
        refuses("sparse_threshold, with a sparse_ratio", [{**CONV2, "sparse_threshold": 0.1}], SparseRatioError, "a sparse_ratio of 0.5 and a sparse_threshold of 0.1, which exclude each other"),
        refuses("sparse_threshold, with a sparse_ratio", [{**CONV2, "target_settings": {"weight": {"sparse_threshold": 0.1}}}], SparseRatioError, "conv2.weight has a sparse_ratio of 0.5 and a sparse_threshold of 0.1, which exclude each other"),
        refuses("target_settings, with an unknown target", [{**CONV2, "target_settings": {"wieght": {"sparse_ratio": 0.25}}}], ConfigListError, r"conv2 \(Conv2d\) has no 'wieght', .* it has weight, bias, _input_ and _output_"),
        ([{"op_names": ["conv2"], "target_settings": {"wieght": {"sparse_ratio": 0.25}}}], ConfigListError, r"conv2 \(Conv2d\) has no 'wieght'"),
        ([{**CONV2, "target_names": ["weight"], "target_settings": {"wieght": {"granularity": "out_channel"}}}], ConfigListError, r"conv2 \(Conv2d\) has no 'wieght'"),
        ([{**CONV2, "target_settings": {"stride": {"sparse_ratio": 0.25}}}], ConfigListError, r"conv2 \(Conv2d\) has no 'stride'"),
        refuses("target_settings, of what target_names leave out", [{**CONV2, "target_names": ["weight"], "target_settings": {"bias": {"sparse_ratio": 0.25}}}], ConfigListError, "target_settings have bias, which target_names leave out"),
        refuses("sparsity, with keys of 3.0", [{**CONV, "sparsity": 0.5, "granularity": "out_channel"}], ConfigListError, "sparsity is a key of .* before 3.0, which has no granularity: write sparse_ratio"),
        refuses("total_sparsity, with keys of 3.0", [{**CONV, "total_sparsity": 0.5, "target_settings": {"weight": {"granularity": "out_channel"}}}], ConfigListError, "total_sparsity is a key of .* before 3.0, which has no target_settings"),
        ([{**CONV, "sparsity": 0.5, "sparse_pattern": "2:4"}], ConfigListError, "before 3.0, which has no sparse_pattern"),
        refuses("granularity: per_channel, of weights", [{**CONV, "sparse_ratio": 0.5, "granularity": "per_channel"}], ConfigListError, "is for inputs and outputs"),
        refuses("granularity: list, that does not divide the weights", [{**CONV, "sparse_ratio": 0.5, "granularity": [5]}], ConfigListError, r"granularity=\[5\] does not divide"),
        ([{**CONV, "sparse_ratio": 0.5, "granularity": [0]}], ConfigListError, "each positive or -1"),
        ([{**CONV, "sparse_ratio": 0.5, "granularity": [1] * 5}], ConfigListError, "at most 4 block sizes"),
        ([{**CONV2, "granularity": [[2], "middle", -1]}], ConfigListError, "or \\[such a list, 'front' or 'back', padding"),
        ([{**CONV2, "granularity": [[2], "back", "x"]}], ConfigListError, "'front' or 'back', padding"),
        ([{**CONV2, "granularity": [[2], "back", -1, 3]}], ConfigListError, "'front' or 'back', padding"),
        ([{**CONV2, "target_settings": {"bias": {"granularity": "in_channel"}}}], ConfigListError, r"conv2.bias has 1 dimension\(s\), no in_channel"),
        ([{**CONV2, "target_settings": {"bias": {"granularity": "per_channel"}}}], ConfigListError, "conv2.bias: granularity='per_channel' is for inputs and outputs"),
        ([{**CONV2, "granularity": "out_channel", "target_settings": {"bias": {"granularity": [2]}}}], ConfigListError, r"conv2.bias: align to .* does not give its shape \[12\] at granularity=\[2\]"),
        refuses("internal_metric_block, below 1", [{**CONV2, "internal_metric_block": 0}], ConfigListError, "conv2.weight: internal_metric_block must be at least 1, or None, got 0"),
        refuses("internal_metric_block, below 1", [{**CONV2, "target_settings": {"weight": {"internal_metric_block": -4}}}], ConfigListError, "at least 1, or None, got -4"),
        refuses("internal_metric_block, that does not divide the weights", [{**CONV, "sparse_ratio": 0.5, "internal_metric_block": 5}], ConfigListError, "does not divide 72 grains"),
        refuses("dependency_group_id, of targets that do not fit each other", [{**CONV, "sparse_ratio": 0.5, "dependency_group_id": 1}], ConfigListError, "72 and 864 grains; give them granularity='out_channel'"),
        refuses("sparse_pattern, that does not divide the input dimension", [{**CONV, "sparse_pattern": "2:4"}], ConfigListError, "input dimension of 1 is not a multiple of 4"),
        ([{**CONV, "sparse_pattern": "4:2"}], ConfigListError, "0 < N < M"),
        ([{**CONV, "sparse_pattern": "2:4", "sparse_ratio": 0.9}], SparseRatioError, "2:4 is a sparse_ratio of 0.5, got 0.9"),
        refuses("sparse_pattern, with a granularity", [{"op_names": ["fc"], "sparse_pattern": "2:4", "granularity": "out_channel"}], ConfigListError, "cannot be combined with granularity"),
        refuses("target_names: _output_, with its own sparse_ratio", [{**CONV, "target_settings": {"_output_": {"sparse_ratio": 0.5}}}], ConfigListError, "_output_.*hold no weights"),
        refuses("apply_method: add, of weights", [{**CONV, "sparse_ratio": 0.5, "apply_method": "add"}], ConfigListError, "apply_method.*'add'.* is not supported"),
        refuses("align, that does not fit", [{**CONV, "sparse_ratio": 0.5, "target_settings": {"bias": {"align": {"module_name": None, "target_name": "weight", "dims": [1]}}}}], ConfigListError, r"bias: align to dims \[1\] of .* does not give its shape \[12\]"),
        ([{**CONV, "sparse_ratio": 0.5, "target_names": ["wieght"]}], ConfigListError, "wieght"),
        ([{"op_types": ["AdaptiveAvgPool2d"], "sparse_ratio": 0.5}], EmptyMatchError, "AdaptiveAvgPool2d"),
        ({"op_types": ["Conv2d"]}, ConfigListError, "a list of dicts"),
        refuses(
            "global_group_id, with several sparse ratios",
            [{"op_names": [name], "sparse_ratio": r, "global_group_id": 1} for name, r in (("conv1", 0.5), ("conv2", 0.6))],
            SparseRatioError,
            "conv2.weight has sparse_ratio 0.6",
        ),
    ],
)  # fmt: skip
def test_bad_lists_leave_the_model_as_it_was(model: nn.Module, config_list, error, words) -> None:
    parameters = dict(model.named_parameters())
    with pytest.raises(error, match=words):
        LotteryJackpotPruner(model, config_list)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_module_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(TargetWithoutParametersError, match=r"1 \(ReLU\)"):
        LotteryJackpotPruner(model, [{"op_types": ["ReLU"], "sparse_ratio": 0.5}])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(TargetWithoutParametersError, match="BatchNorm2d"):
        LotteryJackpotPruner(model, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}])


def test_module_that_nni_does_not_know() -> None:
    model = nn.Sequential(nn.GRU(4, 4))
    with pytest.raises(ConfigListError, match="NNI does not know how to prune 0 \\(GRU\\)"):
        LotteryJackpotPruner(model, [{"op_types": ["GRU"], "sparse_ratio": 0.5}])


def test_weights_that_are_no_floats() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightDtypeError, match=r"0\.weight is torch.int8"):
        LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])


def test_target_that_would_keep_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight.data.fill_(1e-6)
    config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.9, "global_group_id": 0}]
    with pytest.raises(NothingKeptError, match=r"none of the 4 weights of 1\.weight .* lower it, exclude 1"):
        LotteryJackpotPruner(model, config_list, method=EdgePopup.paper())
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("extra", [{}, {"min_sparse_ratio": 0.95}, {"max_sparse_ratio": 0.99}])
def test_default_start_leaves_each_layer_a_tenth_of_the_density(extra: dict) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 100), nn.Linear(100, 40))
    model[1].weight.data.mul_(1e-6)
    config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.98, "global_group_id": 0, **extra}]
    masks = LotteryJackpotPruner(model, config_list).compress()[1]
    kept = [int(masks[str(i)]["weight"].sum()) for i in range(3)]
    size = sum(layer.weight.numel() for layer in model)
    assert sum(kept) == size - int(0.98 * size)
    floor = max(0.002, 1 - extra.get("max_sparse_ratio", 1))
    assert kept[1] == 4000 - int((1 - floor) * 4000)


def test_floor_that_the_weights_do_not_suffice_for() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.9, "global_group_id": 0}]
    with pytest.raises(NothingKeptError, match="max_sparse_ratio"):
        LotteryJackpotPruner(model, config_list)
