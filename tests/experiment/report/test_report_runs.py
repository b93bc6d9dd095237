from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from report_runs import Measures, Write

from nni_jackpot.errors import RunFolderError
from nni_jackpot.experiment.report.measures import labels
from nni_jackpot.experiment.report.runs import find_runs

# -- runs


def test_runs_are_found_at_any_depth(write_run: Write, tmp_path: Path) -> None:
    write_run("alone")
    write_run("sweep/seed=1", seed=1)
    write_run("sweep/seed=2", seed=2)
    unfinished = write_run("sweep/seed=3", seed=3)
    (unfinished / "results.json").unlink()
    found = find_runs([tmp_path / "runs", tmp_path / "runs" / "sweep"])  # one of them twice
    assert [run.seed for run in found.runs] == [0, 1, 2]
    assert [run.number for run in found.runs] == [1, 2, 3]
    assert list(found.skipped) == [unfinished]
    assert "no results.json" in found.skipped[unfinished]
    assert found.runs[1].command == f"nni-jackpot search {tmp_path}/runs/sweep/seed=1/config.yml"


@pytest.mark.parametrize(
    "trials", ["xyz/trials", "xyz/environments/local-env/trials"], ids=["legacy", "environments"]
)
@pytest.mark.parametrize("within", ["", "/output"])
def test_trials_of_an_nni_experiment(write_run: Write, tmp_path: Path, trials: str, within: str) -> None:
    write_run(f"{trials}/AbCde{within}")
    failed = tmp_path / "runs" / trials / "FgHij"
    failed.mkdir()
    found = find_runs([tmp_path / "runs" / "xyz"])
    assert [run.origin for run in found.runs] == [f"trial AbCde of the NNI experiment {tmp_path}/runs/xyz"]
    assert list(found.skipped) == [failed]
    assert "failed" in found.skipped[failed]
    (results,) = (tmp_path / "runs" / "xyz").rglob("results.json")
    results.write_text(json.dumps(json.loads(results.read_text()) | {"trial": 3}))
    (run,) = find_runs([tmp_path / "runs" / "xyz"]).runs
    assert run.origin == f"trial 3 (AbCde) of the NNI experiment {tmp_path}/runs/xyz"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"trial": "3"}))
    with pytest.raises(RunFolderError, match="allowed: a number or null"):
        find_runs([tmp_path / "runs" / "xyz"])


def test_of_two_equal_runs_the_later_counts(write_run: Write, tmp_path: Path) -> None:
    later = write_run("a", jackpot=0.8, device="cpu", output="x")
    earlier = write_run("b", jackpot=0.7, device="auto", data__workers=2, search__checkpoint_every=7)
    other = write_run("c", jackpot=0.6, seed=1)
    os.utime(earlier / "results.json", (1, 1))
    found = find_runs([tmp_path / "runs"])
    assert [run.folder for run in found.runs] == [later, other]
    assert found.skipped == {earlier: f"repeated, with the same config and seed, in {later}"}


def test_a_config_without_the_newer_keys(write_run: Write, measures: Measures) -> None:
    folder = write_run("old")
    content = yaml.safe_load((folder / "config.yml").read_text())
    del content["search"]["recipe"], content["search"]["init"], content["model"]["depth"]
    (folder / "config.yml").write_text(yaml.safe_dump(content))
    write_run("new", seed=1)
    assert {len(one.runs) for one in measures()} == {2}


# -- measures


def test_what_a_row_depends_on(write_run: Write, measures: Measures) -> None:
    tuned = {"initial_tuned": 0.9, "jackpot_tuned": 0.92}
    for epochs in (10, 20):
        for under in ("initial", "both"):
            name = f"{epochs}-{under}"
            write_run(name, 0.9, tuned, search__epochs=epochs, finetune__epochs=5, finetune__under=under)
    # One dense network, one mask and one network tuned under it, though four runs measured them.
    kinds = [one.kind for one in measures()]
    assert kinds == [
        *("dense", "initial", "initial_norm", "initial_tuned"),
        *("jackpot", "jackpot", "jackpot_tuned", "jackpot_tuned"),
    ]
    assert {len(one.runs) for one in measures()} == {1}


def test_a_comparator_depends_on_its_own_settings(write_run: Write, measures: Measures) -> None:
    for lr in (0.1, 0.2):
        own = {"jackpot_tuned": {"epochs": 3, "lr": lr}}
        write_run(f"{lr}", 0.9, {"jackpot_tuned": 0.92}, comparators=own)
    found = [one for one in measures() if one.kind == "jackpot_tuned"]
    assert labels(found) == [
        f"jackpot's mask, weights tuned, comparators.jackpot_tuned.lr={lr}" for lr in (0.1, 0.2)
    ]
    assert [one.kind for one in measures()].count("jackpot") == 1


def test_the_sparsity_is_that_of_the_masks(write_run: Write, measures: Measures) -> None:
    folder = write_run("a", ratio=0.9)
    assert {one.sparsity for one in measures()} == {0.0, 0.9}  # asked for, and found to be 0.89999
    content = yaml.safe_load((folder / "config.yml").read_text())
    content["config_list"][0]["max_sparse_ratio"] = 0.95
    content["config_list"][0]["sparse_ratio"] = 0.98
    (folder / "config.yml").write_text(yaml.safe_dump(content))
    assert {one.sparsity for one in measures()} == {0.0, 0.9}  # asked for 0.98, and found to be 0.9


def test_names_say_what_differs(write_run: Write, measures: Measures) -> None:
    write_run("a")
    write_run("b", search__recipe="paper", search__lr=1.0)
    write_run("c", search__init="snip")
    write_run("d", pretrain__epochs=0)
    assert labels(measures()) == [
        "dense",
        "dense, random weights",
        "magnitude mask alone",
        "snip mask alone",
        "magnitude mask alone, random weights",
        "magnitude mask alone, norm re-estimated",
        "snip mask alone, norm re-estimated",
        "magnitude mask alone, norm re-estimated, random weights",
        "jackpot, from magnitude, default recipe",
        "jackpot, from magnitude, paper recipe, search.lr=1.0",
        "jackpot, from snip, default recipe",
        "jackpot, random weights, from magnitude, default recipe",
    ]
