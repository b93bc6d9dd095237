"""What a run leaves behind for others to read: its results, with the settings and files they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nni_jackpot.errors import JackpotError, RunFolderError
from nni_jackpot.experiment.config import RunConfig, config_hash, load_config, to_dict
from nni_jackpot.experiment.schema.rules import read_section
from nni_jackpot.runtime.files import digest_of_file, replace_file
from nni_jackpot.runtime.resume import differences

RESULTS, CONFIG = "results.json", "config.yml"

# The kinds of rows that a run can have, of which each has the first four.
KINDS = ("dense", "initial", "initial_norm", "jackpot", "initial_tuned", "jackpot_tuned")

_HASH = "settings_hash"

# What two runs may differ in and still give the same results; random seeds aside.
_OF_NO_CONSEQUENCE = {
    "output",
    "device",
    "data.workers",
    "data.download",
    "pretrain.cache",
    "search.checkpoint_every",
    "search.checkpoint_minutes",
}


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes
    ----------
    kind
        What was measured: the ``dense`` network; the ``initial`` mask alone, and with normalisation
        statistics re-estimated (``initial_norm``); the ``jackpot``; weights tuned under the initial mask
        instead (``initial_tuned``), and under the jackpot's (``jackpot_tuned``, Eq. 9).
    accuracy
        On the test images, in [0, 1].
    sparsity
        Share of zeros among the weights of the pruned targets.
    epochs
        Epochs spent after pre-training.
    """

    kind: str
    accuracy: float
    sparsity: float
    epochs: int


@dataclass(frozen=True)
class Result:
    """What a search found, compared with where it started.

    Attributes
    ----------
    rows
        Dense network, initial mask alone, the jackpot, and weights tuned instead where that was asked for.
    overlap
        Of the jackpot with the initial mask (Eq. 7).
    seconds
        Time of the search itself, from where it was resumed if it was.
    folder
        Where ``start.pth`` (the initial masks), ``masks.pth``, ``jackpot.pth`` (the sparse network as a plain
        state dict) and the metrics are.
    resumed_step
        Step of the search at which it was resumed, its last where only what came next had been interrupted; 0
        if nothing was.
    settings
        Of the run, as its YAML file has them. None if an earlier version wrote the results, which then are
        those of ``config.yml`` in the folder.
    files
        Digests of the run's other files, by name.
    """

    rows: list[Row]
    overlap: float
    seconds: float
    folder: Path
    resumed_step: int = 0
    settings: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def check_files(self, *names: str) -> None:
        """See that files of the run's folder are those that the results were saved with.

        Raises
        ------
        RunFolderError
            If one is missing, damaged, or of another run.
        """
        for name in names:
            if name in self.files and self.files[name] != digest_of_file(self.folder / name):
                raise RunFolderError(f"{self.folder / name} is not of the run in {RESULTS}: run it again")


def save_result(result: Result, folder: Path | None = None) -> None:
    """Write the results of a run to its folder, or to where its files lie until it is finished."""
    content = {**asdict(result), "folder": str(result.folder), _HASH: config_hash(result.settings)}
    text = json.dumps(content, indent=2) + "\n"
    replace_file((folder or result.folder) / RESULTS, lambda aside: aside.write_text(text, encoding="utf-8"))


def load_result(folder: Path) -> Result:
    """Read the results of a run from its folder, wherever that has been moved to.

    Raises
    ------
    RunFolderError
        If they are missing or damaged, or not those of the config beside them.
    ExperimentConfigError
        If that config is damaged.
    """
    result = _read_result(folder)
    made, beside = _settings_in(result), settings_of(load_config(folder / CONFIG))
    if found := differences(made, beside):
        raise RunFolderError(f"{folder / RESULTS} is not of the config beside it: {found}; run it again")
    return result


def _read_result(folder: Path) -> Result:
    path = folder / RESULTS
    try:
        raw = json.loads(path.read_bytes())
        rows = [_checked(Row(**row)) for row in raw["rows"]]
        if lacking := [kind for kind in KINDS[:4] if kind not in {row.kind for row in rows}]:
            raise ValueError(f"found no row of kind {', '.join(lacking)}")
        settings = raw.get("settings")
        if raw.pop(_HASH, config_hash(settings)) != config_hash(settings):
            raise ValueError("found settings with the hash of others")
        result = Result(**{**raw, "rows": rows, "folder": folder})
        if not 0 <= result.overlap <= 1:
            raise ValueError(f"found an overlap of {result.overlap}, allowed: a number in [0, 1]")
        if settings is not None:
            read_section(RunConfig, settings, "settings")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is not that of a run ({type(error).__name__}: {error}): run it again"
        ) from error
    return result


def _settings_in(result: Result) -> dict[str, Any]:
    """Return what results are of, by dotted name."""
    if result.settings is None:
        return settings_of(load_config(result.folder / CONFIG))
    return settings_of(read_section(RunConfig, result.settings, ""))


def _checked(row: Row) -> Row:
    if row.kind not in KINDS:
        raise ValueError(f"found a row of kind {row.kind!r}, allowed: {', '.join(KINDS)}")
    if not (0 <= row.accuracy <= 1 and 0 <= row.sparsity < 1 and row.epochs >= 0):
        raise ValueError(f"found {row}, allowed: accuracy and sparsity in [0, 1], epochs >= 0")
    return row


def finished(config: RunConfig) -> Result | None:
    """Return the results of a run that has been made already, with settings that give the same; else None."""
    return finished_in(Path(config.output), config)


def finished_in(folder: Path, config: RunConfig) -> Result | None:
    """Return the results in a folder if they are of the config and all files are theirs; else None."""
    try:
        result = load_result(folder)
        result.check_files(*result.files)
    except JackpotError:  # there is none, or none that can be believed
        return None
    return None if differs(result, config) else result


def found_in(folder: Path) -> Result | None:
    """Return the results in a folder, whatever lies beside them; None if there are none that can be read."""
    try:
        result = _read_result(folder)
        _settings_in(result)
    except JackpotError:
        return None
    return result


def differs(result: Result, config: RunConfig) -> str:
    """Say which settings of a run differ from those of a config; empty if none does."""
    return differences(_settings_in(result), settings_of(config))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return all that the results of a run depend on, by dotted name; null for what the recipe says."""
    short = replace(config, search=config.search.in_short())
    return {name: value for name, value in _flat(to_dict(short)) if name not in _OF_NO_CONSEQUENCE}


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of nested dicts, and of lists of dicts, by their dotted name."""
    if isinstance(node, list) and any(isinstance(child, dict) for child in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield name, node
        return
    for key, child in node.items():
        yield from _flat(child, f"{name}.{key}" if name else str(key))
