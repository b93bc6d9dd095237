"""A real experiment: nnictl, the local training service, the TPE tuner, the Medianstop assessor, our trials."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from conftest import ROOT
from nni_experiment import run_experiment

CONFIGS = ROOT / "configs" / "digits"


def test_a_small_experiment(tmp_path: Path) -> None:
    experiment = yaml.safe_load((CONFIGS / "experiment.yml").read_text())
    run = yaml.safe_load((CONFIGS / "resnet.yml").read_text())
    run["model"]["width"] = 4
    run["pretrain"] |= {"epochs": 2, "cache": str(tmp_path / "pretrained")}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run))
    # The experiment of the repository, with less work.
    experiment["searchSpace"]["search.epochs"] = {"_type": "quniform", "_value": [1, 3, 1]}
    # At 98 %, so narrow a network would keep nothing in its first layer.
    experiment["searchSpace"]["config_list.0.sparse_ratio"]["_value"] = [0.8, 0.9]
    experiment |= {
        "trialCommand": "nni-jackpot search run.yml",
        "trialCodeDirectory": str(tmp_path),
        "experimentWorkingDirectory": str(tmp_path / "experiments"),
        "maxTrialNumber": 3,
    }
    (tmp_path / "experiment.yml").write_text(yaml.safe_dump(experiment))

    trials = run_experiment(tmp_path / "experiment.yml", tmp_path / "home", timeout_s=240)

    assert [trial.status for trial in trials] == ["SUCCEEDED"] * 3
    for trial in trials:
        assert set(trial.parameters) == set(experiment["searchSpace"])
        assert len(trial.intermediate) == trial.parameters["search.epochs"]
        (folder,) = (tmp_path / "experiments").rglob(f"trials/{trial.id}")
        # Not the last epoch's accuracy, which precedes the re-estimation of norm statistics.
        rows = {row["kind"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
        assert trial.final == rows["jackpot"]["accuracy"]
        config = yaml.safe_load((folder / "config.yml").read_text())
        assert config["search"]["lr"] == trial.parameters["search.lr"]
        assert config["config_list"][0]["sparse_ratio"] == trial.parameters["config_list.0.sparse_ratio"]
        assert (folder / "masks.pth").is_file()
    assert len({trial.parameters["search.lr"] for trial in trials}) == 3
