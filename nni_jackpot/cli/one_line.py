"""A search from options of the command line alone, without a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.models.folders import TRANSFORMERS
from nni_jackpot.experiment.presets import PRESETS
from nni_jackpot.experiment.schema.plugins import FUNCTION

# What error messages name in the place of a file.
PLACE = "the command line"


def content_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what the options stand for, as the content of a YAML file; None if there is a file."""
    if options.file is not None:
        return None
    preset = options.preset or "weights"
    is_free = preset not in PRESETS or PRESETS[preset].sparsity is None
    sparsity = 0.9 if options.sparsity is None and is_free else options.sparsity
    search: dict[str, Any] = {"epochs": 3 if options.epochs is None else options.epochs}
    data = _data(options.data, options.model)
    if data["name"] == "text":
        search["loss"] = "kl"  # text has no labels
    content: dict[str, Any] = {
        "output": options.output or f"runs/{_named(options, preset, sparsity)}",
        "data": data,
        "model": {"name": options.model},
    }
    if options.weights is not None:
        content["model"]["weights"] = options.weights
    if options.checkpoint is not None:
        content["pretrain"] = {"checkpoint": options.checkpoint}
    content["preset"] = preset
    if sparsity is not None:
        content["sparsity"] = sparsity
    return {**content, "search": search}


def _data(text: str, model: str) -> dict[str, Any]:
    if text in DATASETS:
        return {"name": text}
    if FUNCTION.holds(text):
        return {"name": "own", "loader": text}
    if model.startswith(TRANSFORMERS) and not Path(text, "train").is_dir():
        return {"name": "text", "root": text}
    return {"name": "image_folder", "root": text}


def _named(options: argparse.Namespace, preset: str, sparsity: float | None) -> str:
    """Return a name for the folder of the run."""
    parts = [Path(options.model).name, Path(options.data).name, preset, sparsity]
    return "-".join(str(part).replace(":", "_") for part in parts if part not in (None, ""))
