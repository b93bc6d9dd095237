"""A real experiment: nnictl, the local training service, the TPE tuner, the Medianstop assessor, our trials."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from nni.experiment.config import ExperimentConfig
from nni_experiment import BIN, run_experiment
from ssh_server import ssh_server

CONFIGS = ROOT / "configs" / "digits"


def tiny(name: str, folder: Path) -> dict[str, Any]:
    """Return an experiment of the repository with less work, whose trials run in ``folder``."""
    run = yaml.safe_load((CONFIGS / "resnet.yml").read_text())
    run["model"]["width"] = 4
    run["pretrain"] |= {"epochs": 2, "cache": str(folder / "pretrained")}
    folder.mkdir(exist_ok=True)
    (folder / "run.yml").write_text(yaml.safe_dump(run))
    experiment = yaml.safe_load((CONFIGS / name).read_text())
    experiment["searchSpace"]["search.epochs"] = {"_type": "quniform", "_value": [1, 3, 1]}
    return experiment | {
        "trialCommand": re.sub(r"\S+resnet.yml|resnet.yml", "run.yml", experiment["trialCommand"]),
        "trialCodeDirectory": str(folder),
        "experimentWorkingDirectory": str(folder.parent / "experiments"),
    }


def test_a_small_experiment(tmp_path: Path) -> None:
    experiment = tiny("experiment.yml", tmp_path / "code") | {"maxTrialNumber": 3}
    (tmp_path / "experiment.yml").write_text(yaml.safe_dump(experiment))

    trials = run_experiment(tmp_path / "experiment.yml", tmp_path / "home", timeout_s=240)

    assert [trial.status for trial in trials] == ["SUCCEEDED"] * 3
    for trial in trials:
        assert set(trial.parameters) == set(experiment["searchSpace"])
        assert len(trial.intermediate) == trial.parameters["search.epochs"]
        (folder,) = (tmp_path / "experiments").rglob(f"trials/{trial.id}")
        # Not the last epoch's accuracy, which precedes the re-estimation of norm statistics.
        results = json.loads((folder / "results.json").read_text())
        (jackpot,) = (row for row in results["rows"] if row["kind"] == "jackpot")
        assert trial.final == {
            "default": jackpot["accuracy"],
            "sparsity": jackpot["sparsity"],
            "overlap": results["overlap"],
        }
        assert all(set(epoch) == set(trial.final) for epoch in trial.intermediate)
        assert results["trial"] == trial.number
        config = yaml.safe_load((folder / "config.yml").read_text())
        assert config["search"]["lr"] == trial.parameters["search.lr"]
        assert config["config_list"][0]["sparse_ratio"] == 0.95
        assert config["data"]["validation_images"] == 300
        assert (folder / "masks.pth").is_file()
    assert len({trial.parameters["search.lr"] for trial in trials}) == 3


def test_an_experiment_over_ssh(tmp_path: Path) -> None:
    with ssh_server(tmp_path / "ssh") as machine:
        experiment = tiny("remote.yml", tmp_path / "code") | {
            "maxTrialNumber": 1,
            "nniManagerIp": "127.0.0.1",
        }
        experiment["trainingService"]["machineList"] = [machine | {"pythonPath": str(BIN)}]
        (tmp_path / "experiment.yml").write_text(yaml.safe_dump(experiment))

        (trial,) = run_experiment(tmp_path / "experiment.yml", tmp_path / "home", timeout_s=240)

    assert trial.status == "SUCCEEDED"
    assert len(trial.intermediate) == trial.parameters["search.epochs"]
    assert trial.final is not None


@pytest.mark.parametrize("name", ["experiment.yml", "remote.yml", "kubeflow.yml"])
def test_nni_accepts_the_file(name: str, tmp_path: Path) -> None:
    experiment = ExperimentConfig.load(CONFIGS / name)
    for machine in getattr(experiment.training_service, "machine_list", []):
        machine.ssh_key_file = tmp_path / "key"
        machine.ssh_key_file.touch()
    experiment.validate()
