"""Paths that come from settings: the home folder, and folders named by the values of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.folder.pretrained import cache_path
from nni_jackpot.experiment.report.write import slugs
from nni_jackpot.experiment.sweep import runs_of

RUN: dict[str, Any] = {
    "output": "runs/here",
    "data": {"name": "digits"},
    "model": {},
    "pretrain": {"epochs": 2, "lr": 0.1},
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}],
    "search": {"epochs": 3},
    "finetune": {"epochs": 0},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def folders(file: Path, **sweep: list[object]) -> list[Path]:
    axes = {key.replace("__", "."): values for key, values in sweep.items()}
    return [Path(config.output) for _, config in runs_of(file, sweep=axes)]


# -- sweeps


@pytest.mark.parametrize(
    "value",
    [
        *("../../../../deep/w1.pth", "..", "../..", "/etc/passwd", "a/b", "~/w.pth", ".", "a/../../b"),
        *("a\nb", "a\x1b[31mb", "a\\b", "a:b*?", "-rf", "數據/模型.pth", 400 * "x", 300 * "數", "a..b"),
    ],
)
def test_a_value_names_one_folder_in_the_output(file: Path, value: str) -> None:
    (folder,) = folders(file, pretrain__checkpoint=[value])
    assert folder.parent == Path("runs/here")
    assert ".." not in folder.name
    assert folder.name.startswith("checkpoint=")
    assert folder.name.isascii()
    assert folder.name.isprintable()
    assert len(folder.name) <= 200
    assert [folder] == folders(file, pretrain__checkpoint=[value])  # for a sweep that is resumed


def test_keys_within_nnis_entries_name_no_folders_elsewhere(file: Path) -> None:
    sweep = {"config_list.0.target_settings.../../up": [1, 2]}
    outputs = [Path(config.output) for _, config in runs_of(file, sweep=sweep)]
    assert {output.parent for output in outputs} == {Path("runs/here")}
    assert len({*outputs}) == 2


@pytest.mark.parametrize(
    "values",
    [
        ["a/b", "a_b", "a:b", "a b", "a\nb"],
        ["../w.pth", "./w.pth", "_/w.pth"],
        [f"{300 * 'x'}{end}" for end in "abc"],
        [None, "null", "true", "1", "1.0", "inf"],
    ],
)
def test_no_two_values_share_a_folder(file: Path, values: list[object]) -> None:
    assert len({*folders(file, pretrain__checkpoint=values)}) == len(values)


def test_values_do_not_pass_for_more_values(file: Path) -> None:
    found = [
        *folders(file, pretrain__checkpoint=["a-root=b"], data__root=["c"]),
        *folders(file, pretrain__checkpoint=["a"], data__root=["b-root=c"]),
        *folders(file, pretrain__lr=[0.1], search__lr=[0.2]),
        *folders(file, search__lr=[0.1], pretrain__lr=[0.2]),
        *folders(file, seed=[0, 1]),
    ]
    assert len({*found}) == len(found)


def test_usual_values_are_there_to_be_read(file: Path) -> None:
    assert [folder.name for folder in folders(file, search__init=["snip"], search__lr=[None, 1e-05])] == [
        "init=snip-lr=null",
        "init=snip-lr=1e-05",
    ]
    assert [folder.name for folder in folders(file, pretrain__lr=[0.1], search__lr=[0.2])] == [
        "pretrain.lr=0.1-search.lr=0.2"
    ]


# -- the home folder


@pytest.mark.parametrize("key", ["output", "data.root", "pretrain.cache", "pretrain.checkpoint"])
def test_the_home_folder_is_meant(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expanded = load_config(file, {key: "~/x"})
    assert expanded == load_config(file, {key: f"{tmp_path}/home/x"})
    assert load_config(file, {key: "./~/x"}) != expanded  # a folder named ~
    with pytest.raises(ExperimentConfigError, match=rf"{key}: found '~nobody-at-all/x', .* is \./~nobody"):
        load_config(file, {key: "~nobody-at-all/x"})


def test_the_home_folder_is_meant_in_sweeps_and_experiments(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ((_, config),) = runs_of(file, {"output": "~/x"}, {"seed": [3]})
    assert config.output == f"{tmp_path}/x/seed=3"
    experiment = {
        "trialCommand": f"nni-jackpot search {file.name}",
        "trialCodeDirectory": "~",
        "searchSpace": {"seed": {"_type": "choice", "_value": [0]}},
    }
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "e.yml").write_text(yaml.safe_dump(experiment))
    assert len(runs_of(tmp_path / "experiments" / "e.yml")) == 1


def test_weights_are_kept_at_home(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path(load_config(file, {"pretrain.cache": "~/weights"})).parent == tmp_path / "weights"


# -- reports


def test_sections_of_similar_titles_have_files_of_their_own() -> None:
    titles = ["timm/a.b on digits", "timm/a-b on digits", f"{200 * 'a'}1", f"{200 * 'a'}2", "x on digits"]
    names = slugs(titles)
    assert len({*names.values()}) == len(titles)
    assert max(map(len, names.values())) < 120
    assert names["x on digits"] == "x-on-digits"
