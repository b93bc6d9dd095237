"""Every file under configs/ is checked, and said to train what it is there for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from nni_jackpot import cli
from nni_jackpot.errors import ConfigListError, ExperimentConfigError
from nni_jackpot.experiment import rehearsal, run
from nni_jackpot.experiment.data.loading import load_data
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.dry_run import plan
from nni_jackpot.experiment.sweep import runs_of
from nni_jackpot.training import TRAINING_METHODS

CONFIGS = ROOT / "configs"
# Spaces that are not grids need NNI's tuners; all other files have a dry run.
# A dry run needs lists of choices; NNI draws the values of these files from ranges.
BY_NNI = {"experiment.yml", "remote.yml", "kubeflow.yml"}
FILES = sorted(path for path in CONFIGS.rglob("*.yml") if path.name not in BY_NNI)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_would_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    runs = runs_of(file)
    content = yaml.safe_load(file.read_text())
    assert len(runs) == content.get("maxTrialNumber", 1)
    text = plan(runs)
    assert f"{len(runs)} runs, " in text
    assert f" {runs[0][1].data.name} " in text


def test_what_is_said_of_digits_is_so() -> None:
    _, config = runs_of(CONFIGS / "digits" / "resnet.yml")[0]
    data = load_data(config.data, 0)
    assert DATASETS.find("digits").size == (sum(data.train.order.sizes), data.shape, data.num_classes)


def test_the_command_prints_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "search", None)
    monkeypatch.chdir(tmp_path)
    file = str(CONFIGS / "digits" / "table1.yml")
    assert cli.main(["search", file, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "sparse_ratio=0.95, recipe=default, epochs=20" in shown
    assert "24 runs" in shown
    assert "nothing was trained" in shown
    assert cli.main(["search", file, "--dry-run", "--set", "seed=0"]) == 0
    assert "8 runs" in capsys.readouterr().out  # one seed out of three
    assert not list(tmp_path.iterdir())


def test_the_arena_names_every_comparator() -> None:
    text = plan(runs_of(CONFIGS / "digits" / "arena.yml"))
    epochs = {"gradual": 10, "obd": 10, "lt": 60}
    for name in TRAINING_METHODS:
        assert f"{name}: {epochs.get(name, 30)}" in " ".join(text.replace("│", " ").split())
    assert "20 epochs" in text  # of tuning, under the initial masks and the jackpot's
    assert "6 runs" in text


def test_steps_are_counted(tmp_path: Path) -> None:
    fixed = {"search.epochs": 3, "finetune.epochs": 2, "finetune.under": "both", "data.batch_size": 100}
    fixed |= {"pretrain.epochs": 5, "pretrain.cache": str(tmp_path)}
    text = plan(runs_of(CONFIGS / "digits" / "resnet.yml", fixed))
    assert f"1 runs, {(5 + 3 + 4) * 15} steps" in text
    text = plan(runs_of(CONFIGS / "digits" / "resnet.yml", {**fixed, "data.train_images": 210}))
    assert f"1 runs, {(5 + 3 + 4) * 3} steps" in text


@pytest.mark.parametrize(
    ("fixed", "error", "words"),
    [
        ({"config_list": [{"op_names": ["nowhere"], "sparse_ratio": 0.5}]}, Exception, "nowhere"),
        ({"config_list.0.sparse_ratio": 1.5}, ConfigListError, "sparse_ratio"),
        ({"data.train_images": 2000}, ExperimentConfigError, r"data.train_images.* 1437"),
        ({"data.image_size": 224, "model.name": "timm/none"}, ExperimentConfigError, r"timm"),
    ],
)
def test_mistakes_are_found(fixed: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(runs_of(CONFIGS / "digits" / "resnet.yml", fixed))


@pytest.mark.parametrize("option", [{"search.init": "wanda"}, {"search.budget": "owl"}])
def test_targets_without_the_inputs_that_are_needed_are_refused(option: dict[str, object]) -> None:
    file = CONFIGS / "digits" / "resnet.yml"
    layers: dict[str, object] = {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
    plan(runs_of(file, {**option, **layers}))
    norms: dict[str, object] = {"config_list": [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]}
    plan(runs_of(file, norms))
    with pytest.raises(ConfigListError, match="'weight' of a BatchNorm2d"):
        plan(runs_of(file, {**option, **norms}))


ROWS = ["table1", "table2", "table3", "table4", "figure2", "figure3", "figure5", "figure6", "figure7"]


@pytest.mark.parametrize("row", ROWS)  # Fig. 4 is made of the runs of Fig. 3
def test_tables_and_figures_of_the_paper_have_an_estimated_time(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr(rehearsal, "_data", lambda config: None)  # blank images: the data need not be here
    monkeypatch.setattr(rehearsal, "_STEPS", 2)
    files = [path for path in FILES if path.name.startswith(row) and path.parent.name != "digits"]
    assert files
    for file in files:
        runs = runs_of(file, {"data.batch_size": 2, "data.workers": 0})  # a step of a moment
        text = plan(runs[:1], here=True)
        assert "1 runs, " in text
        assert re.search(r"steps in all, about [\d:]+ on this machine", text)
