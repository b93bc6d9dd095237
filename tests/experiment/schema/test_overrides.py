"""Settings in place of those of a file, from a command line or a tuner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from minimal_run import MINIMAL, message, write

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import (
    load_config,
    parse_override,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_overrides_take_the_place_of_the_files_values(path: Path) -> None:
    config = load_config(
        path,
        {
            "search.lr": 1.0,
            "seed": 5,
            "data.root": "somewhere",
            "config_list.0.sparse_ratio": 0.95,
            "config_list.0.global_group_id": "all",
            "config_list.1.target_settings.weight.granularity": "out_channel",
            "config_list.0.op_types.0": "Linear",
        },
    )
    assert (config.search.settings.lr, config.seed, config.data.root) == (1.0, 5, "somewhere")
    assert config.config_list[0] == {"op_types": ["Linear"], "sparse_ratio": 0.95, "global_group_id": "all"}
    assert config.config_list[1]["target_settings"]["weight"]["granularity"] == "out_channel"
    assert config.search.epochs == 3


def test_override_gives_what_the_file_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("search: {epochs: 3}", ""))
    assert load_config(path, {"search.epochs": 4}).search.epochs == 4


def test_override_of_a_whole_section(path: Path) -> None:
    config = load_config(path, {"search": {"epochs": 9}, "config_list": [{"op_names": ["fc"]}]})
    assert config.search.epochs == 9
    assert config.config_list == ({"op_names": ["fc"]},)


def test_override_leaves_aliases_of_its_node_alone(tmp_path: Path) -> None:
    text = MINIMAL.replace("pretrain: {", "pretrain: &train {").replace(
        "finetune: {epochs: 1, lr: 1e-2}", "finetune: *train"
    )
    config = load_config(write(tmp_path, text), {"pretrain.lr": 0.5})
    assert (config.pretrain.lr, config.finetune.lr) == (0.5, 0.1)


def test_overrides_leave_the_callers_values_alone(path: Path) -> None:
    entry: dict[str, object] = {"op_names": ["fc"]}
    overrides = {"config_list": [entry], "config_list.0.sparse_ratio": 0.5}
    config = load_config(path, overrides)
    assert entry == {"op_names": ["fc"]}
    assert config.config_list[0] == {"op_names": ["fc"], "sparse_ratio": 0.5}


@pytest.mark.parametrize("value", [4, 4.0, np.int64(4), np.float64(4.0), np.float32(4.0)])
def test_what_tuners_hand_over_for_integers(path: Path, value: object) -> None:
    config = load_config(path, {"search.epochs": value, "seed": value})
    assert (config.search.epochs, type(config.search.epochs), config.seed) == (4, int, 4)


@pytest.mark.parametrize(("value", "number"), [(np.float64(0.25), 0.25), (np.int32(2), 2.0)])
def test_what_tuners_hand_over_for_numbers(path: Path, value: object, number: float) -> None:
    config = load_config(path, {"search.lr": value, "config_list.0.sparse_ratio": value})
    assert (lr := config.search.settings.lr, type(lr)) == (number, float)
    assert type(config.config_list[0]["sparse_ratio"]) in (int, float)


def test_tuners_boolean(path: Path) -> None:
    assert load_config(path, {"search.normalize": np.bool_(False)}).search.settings.normalize is False


def test_integral_float_for_an_integer_is_for_overrides_only(tmp_path: Path) -> None:
    said = message(write(tmp_path, MINIMAL.replace("search: {epochs: 3}", "search: {epochs: 3.0}")))
    assert "search.epochs: found 3.0 (float), allowed: an integer >= 0" in said


def test_override_with_a_fraction_for_an_integer(path: Path) -> None:
    assert "search.epochs: found 3.5 (float)" in message(path, {"search.epochs": 3.5})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("search.lrr", "allowed: epochs, init, method, recipe, lr"),
        ("serch.lr", "did you mean search?"),
        ("", "unknown key ''"),
        ("search..lr", "unknown key ''"),
        ("config_list.2.sparse_ratio", "allowed: 0 to 1"),
        ("config_list.first.sparse_ratio", "allowed: 0 to 1"),
        ("config_list.-1.sparse_ratio", "allowed: 0 to 1"),
        ("config_list.0.sparse_ratio.x", "has no keys"),
        ("seed.x", "allowed: an integer"),
        ("output.x", "has no keys"),
    ],
)
def test_override_of_what_there_is_not(path: Path, name: str, reason: str) -> None:
    said = message(path, {name: 1})
    assert f"override {name}" in said
    assert reason in said


def test_override_inside_a_section_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("search: {epochs: 3}", "search:"))
    assert "search.epochs: this override looks for 'epochs' in None" in message(path, {"search.epochs": 2})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search.lr=1.0", ("search.lr", 1.0)),
        ("search.lr=1e-3", ("search.lr", 1e-3)),
        ("search.normalize=false", ("search.normalize", False)),
        ("data.root=null", ("data.root", None)),
        ("data.root=", ("data.root", None)),
        ("output=a=b", ("output", "a=b")),
        ("config_list.0.op_types=[Conv2d, Linear]", ("config_list.0.op_types", ["Conv2d", "Linear"])),
        (" seed = 3 ", ("seed", 3)),
    ],
)
def test_parse_override(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["search.lr", "=1", " =1", "", "x=[1", "x={a: 1, a: 2}"])
def test_parse_override_rejects(text: str) -> None:
    with pytest.raises(ExperimentConfigError) as caught:
        parse_override(text)
    assert repr(text) in str(caught.value)
