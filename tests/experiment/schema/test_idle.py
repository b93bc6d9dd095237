"""A setting that has no effect is an error, in a file, in an override and in a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, dump_config, load_config
from nni_jackpot.experiment.sweep import runs_of

_CHECKPOINT = {"pretrain": {"checkpoint": "my.pth"}}


def load(folder: Path, overrides: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(content(**sections)))
    return load_config(path, overrides or {})


def content(**sections: Any) -> dict[str, Any]:
    whole = {
        "output": "out",
        "data": {"name": "digits"},
        "model": {"name": "resnet"},
        "pretrain": {"epochs": 1, "lr": 0.1},
        "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
        "search": {"epochs": 1},
    }
    for name, value in sections.items():
        is_more = isinstance(value, dict) and "checkpoint" not in value
        whole[name] = {**whole.get(name, {}), **value} if is_more else value
    return whole


@pytest.mark.parametrize(
    ("sections", "key", "why"),
    [
        ({"pretrain": {"checkpoint": "my.pth", "epochs": 5}}, "pretrain.epochs", "pretrain.checkpoint"),
        ({"pretrain": {"checkpoint": "my.pth", "lr": 0.2}}, "pretrain.lr", "pretrain.checkpoint"),
        ({"model": {"init": "kaiming"}, **_CHECKPOINT}, "model.init", "pretrain.checkpoint"),
        ({"pretrain": {"epochs": 0, "momentum": 0.5}}, "pretrain.momentum", "pretrain.epochs is 0"),
        ({"finetune": {"lr": 0.1}}, "finetune.lr", "finetune.epochs is 0"),
        ({"finetune": {"under": "both"}}, "finetune.under", "finetune.epochs is 0"),
        ({"search": {"epochs": 0, "lr": 0.5}}, "search.lr", "search.epochs is 0"),
        ({"search": {"epochs": 0, "recipe": "paper"}}, "search.recipe", "search.epochs is 0"),
        ({"search": {"epochs": 0, "blockwise": {}, "lr": 0.5}}, "search.lr", "search.blockwise"),
        ({"search": {"init_batches": 4}}, "search.init_batches", "need no batches"),
        (
            {"comparators": {"rigl": {"epochs": 1, "lr": 0.1, "start": "jackpot", "budget": "lamp"}}},
            "comparators.rigl.budget",
            "comparators.rigl.start is jackpot",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(
    tmp_path: Path, sections: dict[str, Any], key: str, why: str
) -> None:
    with pytest.raises(ExperimentConfigError) as caught:
        load(tmp_path, **sections)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'run.yml'}: {key}: found ")
    assert "which has no effect because " in said
    assert why in said
    assert said.endswith("remove the key")


@pytest.mark.parametrize(
    "sections",
    [
        {"search": {"init": "snip", "init_batches": 4}},
        {"finetune": {"epochs": 1, "lr": 0.1, "under": "both"}},
        {"model": {"init": "kaiming"}},
        {
            "model": {"init": "kaiming"},
            **_CHECKPOINT,
            "comparators": {"rigl": {"epochs": 1, "lr": 0.1, "from_scratch": True}},
        },
        {"preset": "2:4", "config_list": [], "search": {"epochs": 0}},
        {"finetune": {"epochs": 0, "lr": 0.05}},
    ],
)
def test_settings_with_an_effect_or_the_usual_value_are_taken(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    load(tmp_path, **sections)


def test_an_override_may_switch_a_section_off_but_not_set_what_the_file_has_off(tmp_path: Path) -> None:
    tuned = {"finetune": {"epochs": 3, "lr": 0.1}}
    assert load(tmp_path, {"finetune.epochs": 0}, **tuned).compared == {}
    combined = {"finetune.epochs": 0, "finetune.lr": 0.2}  # one combination of a search space
    assert load(tmp_path, combined, **tuned).compared == {}
    with pytest.raises(ExperimentConfigError, match=r"with the override finetune\.lr"):
        load(tmp_path, {"finetune.lr": 0.2}, finetune={"epochs": 0})
    assert load(tmp_path, {"pretrain.checkpoint": "my.pth"}).pretrain.checkpoint == "my.pth"


def test_a_sweep_over_a_setting_without_effect_is_refused(tmp_path: Path) -> None:
    load(tmp_path, **_CHECKPOINT)
    with pytest.raises(ExperimentConfigError, match=r"pretrain\.lr: found 0\.2 .*, which has no effect"):
        runs_of(tmp_path / "run.yml", sweep={"pretrain.lr": [0.2, 0.3]})


@pytest.mark.parametrize("search", [{"epochs": 0}, {"epochs": 0, "blockwise": {}}, {"epochs": 2}])
@pytest.mark.parametrize("pretrain", [{"checkpoint": "my.pth"}, {"epochs": 0}])
def test_the_file_that_a_run_writes_can_be_read(
    tmp_path: Path, search: dict[str, Any], pretrain: dict[str, Any]
) -> None:
    config = load(tmp_path, search=search, pretrain=pretrain)
    dump_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config
