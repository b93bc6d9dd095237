"""Finished runs, found in and below given folders."""

from __future__ import annotations

import csv
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nni_jackpot.errors import RunFolderError
from nni_jackpot.experiment.config import RunConfig, load_config, settings_of, to_dict
from nni_jackpot.experiment.folder.result import RESULTS, Row, load_result
from nni_jackpot.experiment.schema.search import SearchConfig
from nni_jackpot.masking.methods.method import METHODS


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    number
        Number in the report's list of runs, from 1.
    folder
        Folder of the run.
    seed
        Seed of all random numbers.
    settings
        All other settings that its results depend on, by dotted name: ``{"search.epochs": 20, ...}``; None
        for a setting of the method that has the recipe's value.
    effective
        The same, with the recipe's values.
    rows
        Results by kind.
    overlap
        Overlap of the jackpot with the initial mask, in [0, 1].
    curve
        Accuracy, in [0, 1], after each epoch of the search.
    trial
        Number in NNI's web portal, if the run is a trial of an NNI experiment.
    """

    number: int
    folder: Path
    seed: int
    settings: dict[str, Any]
    effective: dict[str, Any]
    rows: dict[str, Row]
    overlap: float
    curve: dict[int, float]
    trial: int | None

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        return shlex.join(["nni-jackpot", "search", str(self.folder / "config.yml")])

    @property
    def origin(self) -> str:
        """The NNI experiment that the run is a trial of; else empty."""
        trial = next((f for f in (self.folder, *self.folder.parents) if f.parent.name == "trials"), None)
        if trial is None:
            return ""
        # NNI keeps trials in trials/ or environments/NAME/trials/ of the experiment's folder.
        experiment = trial.parents[3] if trial.parents[2].name == "environments" else trial.parents[1]
        name = trial.name if self.trial is None else f"{self.trial} ({trial.name})"
        return f"trial {name} of the NNI experiment {experiment}"


@dataclass(frozen=True)
class Found:
    """Finished runs below some folders, and skipped folders with the reason."""

    runs: list[Run]
    skipped: dict[Path, str]


def find_runs(paths: Sequence[Path]) -> Found:
    """Read all finished runs in and below folders of runs, sweeps or NNI experiments.

    Of runs with the same config and seed, the one with the newest results counts.

    Raises
    ------
    RunFolderError
        If a folder does not exist or no finished run is in or below it; if a file of a run is damaged.
    ExperimentConfigError
        If a run's ``config.yml`` is.
    """
    found: dict[Path, Run] = {}  # a folder that is named twice is read once
    skipped: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder; allowed: a folder of runs or of an NNI experiment")
        finished, unfinished = _folders(path)
        if not finished:
            raise RunFolderError(f"{path} holds no finished run, which has config.yml and results.json")
        found |= {folder.resolve(): _read_run(folder) for folder in finished}
        skipped |= unfinished
    runs, replaced = _newest(list(found.values()))
    numbered = [replace(run, number=i) for i, run in enumerate(runs, start=1)]
    return Found(numbered, skipped | replaced)


def _folders(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the folders of finished runs, and other folders with the reason why they are skipped."""
    finished, unfinished, trials = [], {}, []
    for name, folders, files in os.walk(path):
        folders.sort()
        folder = Path(name)
        if {"config.yml", "results.json"} <= set(files):
            finished.append(folder)
        elif "config.yml" in files:
            unfinished[folder] = "no results.json: unfinished, failed, or only pre-trained"
        elif "results.json" in files:
            unfinished[folder] = "no config.yml"
        if folder.name == "trials":
            trials += [folder / trial for trial in folders]
    for trial in trials:
        if not any(folder.is_relative_to(trial) for folder in (*finished, *unfinished)):
            unfinished[trial] = "no config.yml: the trial failed before its run began"
    return finished, unfinished


def _newest(runs: list[Run]) -> tuple[list[Run], dict[Path, str]]:
    """Return the newest runs, and the folders of runs that were repeated later."""
    newest: dict[str, Run] = {}
    replaced = {}
    for run in runs:
        key = json.dumps([run.settings, run.seed], sort_keys=True)
        other = newest.get(key)
        old, new = sorted([other or run, run], key=lambda run: (run.folder / RESULTS).stat().st_mtime_ns)
        newest[key] = new
        if other is not None:
            replaced[old.folder] = f"repeated, with the same config and seed, in {new.folder}"
    return list(newest.values()), replaced


def _read_run(folder: Path) -> Run:
    config = load_config(folder / "config.yml", is_stored=True)
    result = load_result(folder)
    path = folder / "metrics.csv"
    try:
        curve = dict(_curve(path))
    except (OSError, ValueError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunFolderError(f"{path} is not that of a run ({reason}): run it again") from error
    rows = {row.kind: row for row in result.rows}
    effective = _settings(config)
    settings = effective | _left_to_recipe(config)
    return Run(0, folder, config.seed, settings, effective, rows, result.overlap, curve, result.trial)


def _curve(path: Path) -> Iterator[tuple[int, float]]:
    if path.exists():  # the tables do not need it
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if "accuracy" in row:  # text has other measures, which no figure shows
                    yield int(row["epoch"]), float(row["accuracy"])


def _left_to_recipe(config: RunConfig) -> dict[str, None]:
    """Return None for each setting of the search that has the recipe's value, by dotted name."""
    search = config.search
    if search.method not in METHODS or search.recipe not in METHODS.find(search.method).recipes():
        return {}
    usual = to_dict(SearchConfig(epochs=0, method=search.method, recipe=search.recipe))
    names = [*to_dict(search.settings), "reestimate_norm"]
    return {f"search.{name}": None for name in names if to_dict(search)[name] == usual[name]}


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings that results depend on, without the seed, by dotted name.

    ``weights`` says whether the weights are pre-trained, or random and of which distribution. Random weights
    do not depend on pre-training.
    """
    settings = settings_of(config)
    del settings["seed"]
    settings["search.init"] = config.search.named_init
    start = [settings["pretrain.epochs"], settings["pretrain.checkpoint"], settings.get("model.weights")]
    start.append("model.task" in settings)  # networks of transformers have their weights
    if any(start):
        return {"weights": "pre-trained", **settings}
    drawn = settings.pop("model.init")
    weights = "random" if drawn is None else f"random {drawn.replace('_', ' ')}"
    return {"weights": weights, **{k: v for k, v in settings.items() if not k.startswith("pretrain.")}}
