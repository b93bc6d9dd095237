"""Equal configs have equal hashes, and a config that is written is read as the same."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from minimal_run import MINIMAL, write

from nni_jackpot.errors import OutputFolderError
from nni_jackpot.experiment.config import (
    config_hash,
    dump_config,
    load_config,
    to_dict,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_equal_contents_have_equal_hashes(path: Path) -> None:
    config = load_config(path)
    digits = config_hash(config)
    assert len(digits) == 12
    assert set(digits) <= set("0123456789abcdef")
    assert digits == config_hash(load_config(path)) == config_hash(to_dict(config))
    assert config_hash({"a": 1, "b": [config.data]}) == config_hash({"b": [config.data], "a": 1})


def test_number_written_as_an_integer_hashes_alike(path: Path) -> None:
    whole, fraction = (load_config(path, {"search.lr": lr}) for lr in (1, 1.0))
    assert config_hash(whole) == config_hash(fraction)


@pytest.mark.parametrize(
    "override",
    [
        {"seed": 1},
        {"search.lr": 0.1000001},
        {"data.augment": True},
        {"config_list.0.sparse_ratio": 0.91},
        {"pretrain.checkpoint": "x.pt"},
    ],
)
def test_other_contents_have_other_hashes(path: Path, override: dict[str, object]) -> None:
    assert config_hash(load_config(path)) != config_hash(load_config(path, override))


def test_dumped_config_reads_as_an_equal_one(path: Path, tmp_path: Path) -> None:
    strings = {"output": "1e-3", "data.root": "übung: #1", "pretrain.cache": "null", "device": "cuda:0"}
    config = load_config(path, {**strings, "search.weight_decay": 1e-5, "seed": 7})
    target = tmp_path / "new" / "folder" / "config.yaml"
    dump_config(config, target)
    assert load_config(target) == config
    assert os.listdir(target.parent) == ["config.yaml"]


def test_dump_replaces_the_file(path: Path) -> None:
    dump_config(load_config(path, {"seed": 3}), path)
    assert load_config(path).seed == 3


def test_dump_into_what_is_no_folder(path: Path) -> None:
    with pytest.raises(OutputFolderError, match=r"run\.yaml"):
        dump_config(load_config(path), path / "config.yaml")


def test_configs_are_frozen(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
