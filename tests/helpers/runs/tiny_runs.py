"""Runs of half a second, and the files that they write; not a test."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from nni_jackpot import cli

_RUN: dict[str, Any] = {
    "device": "cpu",
    "data": {"name": "digits", "batch_size": 64, "train_images": 128},
    "model": {"width": 2},
    "pretrain": {"epochs": 1, "lr": 0.1},
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.8, "global_group_id": 0}],
    "search": {"epochs": 2, "checkpoint_every": 1},
    "finetune": {"epochs": 1, "lr": 0.05, "under": "both"},
}
# Of these the same numbers come out, whenever and in how many pieces a run is made.
_COLUMNS = "epoch", "step", "accuracy", "loss", "learning_rate", "flips", "overlap"


def write_file(root: Path, **changes: Any) -> Path:
    """Write the YAML file of a run to ``out`` below a folder, and return it.

    ``changes`` replace values of sections, or whole values of the top level.
    """
    content = {**_RUN, "output": str(root / "out")}
    content["pretrain"] = {**_RUN["pretrain"], "cache": str(root / "cache")}
    for name, value in changes.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    path = root / "run.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(name: str, file: Path, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    """Run a command with settings that override the file's, and return its exit code."""
    return cli.main([name, str(file), *(word for text in overrides for word in ("--set", text)), *flags])


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, and its empty folders, by path."""
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that is equal in the folders of two runs with the same settings."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name.startswith("events.out."):
            continue
        if name == "results.json":
            content = json.loads(path.read_bytes())
            found[name] = {key: content[key] for key in ("rows", "overlap", "files")}
            for row in content["rows"]:
                del row["seconds"], row["peak_memory_bytes"]
            found[f"settings in {name}"] = _placeless(content["settings"])
        elif name == "config.yml":
            found[name] = _placeless(yaml.safe_load(path.read_bytes()))
        elif path.name == "metrics.csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            found[name] = [{key: row[key] for key in _COLUMNS if key in row} for row in rows]
        elif path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def _placeless(settings: dict[str, Any]) -> dict[str, Any]:
    pretrain = {name: value for name, value in settings["pretrain"].items() if name != "cache"}
    return {name: value for name, value in {**settings, "pretrain": pretrain}.items() if name != "output"}


def copied(folder: Path, to: Path) -> Path:
    """Copy a folder, replacing an existing one, and return the copy."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))
