"""The runs of a file: one run's YAML file, or an NNI experiment that sweeps over it."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, config_hash, load_config, read_config
from nni_jackpot.experiment.schema import strict_yaml
from nni_jackpot.experiment.schema.paths import folder_name
from nni_jackpot.experiment.schema.rules import related

# The command of a trial.
_COMMAND = ["nni-jackpot", "search"]

_MOST_RUNS = 10_000


def runs_of(
    path: Path,
    fixed: Mapping[str, object] = {},
    sweep: Mapping[str, Sequence[object]] = {},
    given: Mapping[str, Any] | None = None,
) -> list[tuple[dict[str, object], RunConfig]]:
    """Return the swept values and the config of every run; all configs are read before the first run.

    Parameters
    ----------
    path
        A run's YAML file, or that of an NNI experiment whose trials are ``nni-jackpot search FILE`` and whose
        search space is a grid: ``choice`` alone. The runs are those of NNI's GridSearch.
    fixed
        Values by dotted name, which replace values of the file and of the search space.
    sweep
        Lists of values by dotted name, which replace those of the search space; one run per combination.
    given
        Content of a run's file, which need not exist; ``path`` is its name in messages.

    Raises
    ------
    ExperimentConfigError
        If a file cannot be read, a name is both fixed and swept, two runs are the same, or a run is not
        valid.
    """
    if twice := sorted(a for a in fixed if any(related(a, b) for b in sweep)):
        raise ExperimentConfigError(f"{', '.join(twice)}: is both set and swept, allowed: one of them")
    content = _mapping(path) if given is None else {}
    if "trialCommand" in content:
        grid = {name: values for name, values in _grid(path, content).items() if name not in fixed}
        sweep = {**grid, **sweep}
        path = _trial_file(path, content)
    if (count := math.prod(map(len, sweep.values()))) > _MOST_RUNS:
        raise ExperimentConfigError(f"{path}: a sweep of {count:,} runs, allowed: up to {_MOST_RUNS:,}")
    runs = []
    made: set[str] = set()
    for values in itertools.product(*sweep.values()):
        swept = dict(zip(sweep, values, strict=True))
        config = _read(path, given, {**fixed, **swept})
        if (key := config_hash(config)) in made:  # their mean would count one run twice
            raise ExperimentConfigError(f"{path}: two runs of the sweep are the same: {named(swept)}")
        made.add(key)
        if swept:  # each run needs its own folder
            name = folder_name(swept, {key: shown(value) for key, value in swept.items()})
            output = {"output": str(Path(config.output) / name)}
            config = _read(path, given, {**fixed, **swept, **output})
        runs.append((swept, config))
    return runs


def _read(path: Path, given: Mapping[str, Any] | None, overrides: Mapping[str, object]) -> RunConfig:
    return load_config(path, overrides) if given is None else read_config(dict(given), path, overrides)


def named(swept: Mapping[str, object], short: bool = False) -> str:
    """Return the swept values of a run in the form of the command line; short, without sections."""
    return ", ".join(f"{key.split('.')[-1] if short else key}={shown(value)}" for key, value in swept.items())


def shown(value: object) -> str:
    """Return a value in its YAML form: null and true, not None and True."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _mapping(path: Path) -> dict[str, Any]:
    """Read a file to find out whether it is an experiment; `load_config` reports errors in a run's file.

    PyYAML's rules apply, as in NNI: a value that NNI passes to its trials as a string is a string here, too.
    """
    try:
        content = strict_yaml.parse(strict_yaml.read(path), like_nni=True)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _trial_file(path: Path, content: Mapping[str, Any]) -> Path:
    try:
        words = shlex.split(str(content["trialCommand"]))
    except ValueError:  # an open quote
        words = []
    if words[:2] != _COMMAND or len(words) != 3:
        raise ExperimentConfigError(
            f"{path}: trialCommand: found {content['trialCommand']!r}, allowed: {' '.join(_COMMAND)} FILE"
        )
    # NNI resolves relative paths from the folder of the experiment's file.
    return path.parent / os.path.expanduser(str(content.get("trialCodeDirectory", "."))) / words[2]


def _grid(path: Path, content: Mapping[str, Any]) -> dict[str, list[object]]:
    space = content.get("searchSpace")
    if not isinstance(space, dict) or not space or not all(isinstance(name, str) for name in space):
        raise ExperimentConfigError(
            f"{path}: searchSpace: found {space!r}, allowed: dotted names with choices"
        )
    return {name: list(_choices(path, name, entry)) for name, entry in space.items()}


def _choices(path: Path, name: str, entry: object) -> Iterator[object]:
    kind = entry.get("_type") if isinstance(entry, dict) else None
    values = entry.get("_value") if isinstance(entry, dict) else None
    if kind != "choice" or not isinstance(values, list) or not values:
        raise ExperimentConfigError(
            f"{path}: searchSpace.{name}: found {entry!r}, allowed is a choice of values, which make a grid; "
            f"for another space launch the experiment by NNI: nnictl create --config {path}"
        )
    yield from values
