"""Configs and examples that come with the package, by name: ``digits/resnet``, ``quickstart``."""

from __future__ import annotations

import os
from pathlib import Path

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.runtime.registry import close_match

_PACKAGE = Path(__file__).parents[2]


def shipped_files() -> dict[str, Path]:
    """Return the files by name: configs by folder and stem, examples by stem."""
    configs, examples = _folder("configs"), _folder("examples")
    files = {f"{path.parent.name}/{path.stem}": path for path in sorted(configs.glob("*/*.yml"))}
    return files | {path.stem: path for path in sorted(examples.glob("[!_]*.py"))}


def config_file(given: Path) -> Path:
    """Return the config file that a path or a name means; an existing file goes first.

    Raises
    ------
    ExperimentConfigError
        If there is no such file, but a shipped one has a similar name.
    """
    if os.path.lexists(given):
        return given
    configs = {name: path for name, path in shipped_files().items() if path.suffix == ".yml"}
    name = given.as_posix().removeprefix("configs/").removesuffix(".yml")
    if name in configs:
        return configs[name]
    if close := close_match(name, configs):
        raise ExperimentConfigError(f"{given}: cannot be read: No such file or directory{close}")
    return given


def _folder(name: str) -> Path:
    """Return a shipped folder: within an installed package, or beside the package in its source."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
