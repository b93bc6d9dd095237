"""Folders of finished runs, written without a search; not a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from nni_jackpot.experiment.config import dump_config, load_config
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.report.measures import Measure, measure
from nni_jackpot.experiment.report.runs import find_runs

Write = Callable[..., Path]
Measures = Callable[[], list[Measure]]

_CONFIG: dict[str, Any] = {
    "output": "runs/elsewhere",
    "data": {"name": "digits"},
    "model": {"depth": 8, "width": 16},
    "pretrain": {"epochs": 30, "lr": 0.1},
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 0}],
    "search": {"epochs": 20, "init": "magnitude", "recipe": "default"},
    "finetune": {"epochs": 0, "lr": 0.05},
}


def write_run(
    root: Path,
    name: str,
    jackpot: float = 0.9,
    more: Mapping[str, float] = MappingProxyType({}),
    **settings: Any,
) -> Path:
    """Write a run's folder, and return it.

    Parameters
    ----------
    root, name
        Where.
    jackpot
        Accuracy of the jackpot.
    more
        Accuracies of other kinds of rows, in place of the usual ones or besides.
    **settings
        Of the config: ``search__epochs`` for ``search.epochs``; ``ratio`` is the sparse ratio.
    """
    folder = root / name
    folder.mkdir(parents=True)
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(_CONFIG))
    names = {key: key.replace("__", ".") for key in settings} | {"ratio": "config_list.0.sparse_ratio"}
    config = load_config(file, {names[key]: value for key, value in settings.items()})
    dump_config(config, file)

    ratio, epochs, tuning = (
        config.config_list[0]["sparse_ratio"],
        config.search.epochs,
        config.finetune.epochs,
    )
    accuracies = {"dense": 0.95, "initial": 0.25, "initial_norm": 0.5, "jackpot": jackpot, **more}
    spent = {"jackpot": epochs, "initial_tuned": tuning, "jackpot_tuned": epochs + tuning}
    rows = [
        vars(Row(kind, accuracy, 0.0 if kind == "dense" else ratio - 1e-5, spent.get(kind, 0)))
        for kind, accuracy in accuracies.items()
    ]
    content = {"rows": rows, "overlap": 0.96, "seconds": 1.0, "folder": str(folder)}
    (folder / "results.json").write_text(json.dumps(content))
    curve = [f"{epoch},{10 * epoch},{jackpot - 0.1 / epoch},0.5\n" for epoch in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text("".join(["epoch,step,accuracy,loss\n", *curve]))
    return folder


def measures_of(root: Path) -> list[Measure]:
    """Return the results of the runs below a folder."""
    return measure(find_runs([root]).runs)
