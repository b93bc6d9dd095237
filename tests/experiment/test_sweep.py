"""Experiments as lists of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.sweep import runs_of

RUN = """
output: runs/here
data: {name: digits}
model: {}
pretrain: {epochs: 2, lr: 0.1}
config_list: [{op_types: [Conv2d], sparse_ratio: 0.9}]
search: {epochs: 3}
finetune: {epochs: 0}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "code" / "configs").mkdir(parents=True)
    (tmp_path / "code" / "configs" / "run.yml").write_text(RUN)
    content = {
        "trialCommand": "nni-jackpot search configs/run.yml",
        "trialCodeDirectory": "code",
        "searchSpace": {
            "config_list.0.sparse_ratio": {"_type": "choice", "_value": [0.9, 0.95]},
            "seed": {"_type": "choice", "_value": [0, 1]},
            "search.lr": {"_type": "choice", "_value": [None]},
        },
    }
    path = tmp_path / "experiment.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def edited(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


def test_an_experiment_is_a_grid_of_runs(experiment: Path) -> None:
    runs = runs_of(experiment, {"search.epochs": 5}, {"seed": [7], "search.init": ["random"]})
    assert [swept for swept, _ in runs] == [
        {"config_list.0.sparse_ratio": ratio, "seed": 7, "search.lr": None, "search.init": "random"}
        for ratio in (0.9, 0.95)
    ]
    assert [config.config_list[0]["sparse_ratio"] for _, config in runs] == [0.9, 0.95]
    assert {(config.search.epochs, config.seed, config.search.init) for _, config in runs} == {
        (5, 7, "random")
    }
    assert runs[1][1].output == "runs/here/sparse_ratio=0.95-lr=null-seed=7-init=random"
    assert len(runs_of(experiment)) == 4
    fixed = runs_of(experiment, {"seed": 5})
    assert [(len(swept), config.seed) for swept, config in fixed] == [(2, 5), (2, 5)]
    with pytest.raises(ExperimentConfigError, match="seed: is both set and swept"):
        runs_of(experiment, {"seed": 5}, {"seed": [6, 7]})


def test_a_run_is_a_run(experiment: Path) -> None:
    ((swept, config),) = runs_of(experiment.parent / "code" / "configs" / "run.yml")
    assert (swept, config.output) == ({}, "runs/here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trialCommand": "python train.py"}, "allowed: nni-jackpot search FILE"),
        ({"trialCommand": "nni-jackpot search a.yml --set seed=1"}, "allowed: nni-jackpot search FILE"),
        ({"trialCommand": "nni-jackpot search none.yml"}, "none.yml: cannot be read"),
        ({"searchSpace": None}, "searchSpace: found None"),
        (
            {"searchSpace": {"search.lr": {"_type": "loguniform", "_value": [0.1, 1]}}},
            r"searchSpace.search.lr: .* nnictl create --config .*experiment.yml",
        ),
        ({"searchSpace": {"search.lr": {"_type": "choice", "_value": []}}}, r"searchSpace.search.lr"),
        ({"searchSpace": {"search.speed": {"_type": "choice", "_value": [1]}}}, "unknown key 'speed'"),
    ],
)
def test_what_makes_no_runs(experiment: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ExperimentConfigError, match=words):
        runs_of(edited(experiment, **changes))


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ExperimentConfigError, match=r"none\.yml: cannot be read"):
        runs_of(tmp_path / "none.yml")


def test_runs_that_are_the_same_are_refused(experiment: Path) -> None:
    twice = {"seed": {"_type": "choice", "_value": [0, 0]}}
    with pytest.raises(ExperimentConfigError, match="two runs of the sweep are the same: seed=0"):
        runs_of(edited(experiment, searchSpace=twice))
    run = experiment.parent / "code" / "configs" / "run.yml"
    with pytest.raises(ExperimentConfigError, match="are the same"):
        runs_of(run, {}, {"seed": [0, 1], "search.lr": [0.1, 0.1]})
    assert len(runs_of(run, {}, {"seed": [0, 1], "search.lr": [0.1, 0.2]})) == 4
    assert len(runs_of(run, {}, {"output": ["a", "b"]})) == 2


def test_a_parent_is_not_set_where_its_child_is_swept(experiment: Path) -> None:
    for fixed, swept in (("search.epochs", "search"), ("search", "search.epochs")):
        value = {"epochs": 1} if fixed == "search" else 1
        values = [{"epochs": 2}] if swept == "search" else [2]
        with pytest.raises(ExperimentConfigError, match=f"{fixed}: is both set and swept"):
            runs_of(experiment, {fixed: value}, {swept: values})


def test_more_runs_than_anyone_waits_for(experiment: Path) -> None:
    with pytest.raises(ExperimentConfigError, match="a sweep of 2,000,000 runs, allowed: up to 10,000"):
        runs_of(experiment, {}, {"seed": range(1000), "search.epochs": range(1000), "search.lr": [0.1]})
