"""The results of a run, with the settings and the files that they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from nni_jackpot.errors import JackpotError, RunFolderError
from nni_jackpot.experiment.config import (
    RunConfig,
    config_hash,
    load_config,
    settings_of,
    stored_config,
)
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.runtime.files import digest_of_file, replace_file
from nni_jackpot.runtime.resume import differences

RESULTS, CONFIG = "results.json", "config.yml"

# The kinds of rows; each run has dense network, initial masks and jackpot; comparators may add others.
KINDS = ("dense", "initial", "initial_norm", "jackpot", "initial_tuned", "jackpot_tuned")
_REQUIRED = ("dense", "initial", "jackpot")

_HASH = "settings_hash"


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes
    ----------
    kind
        What was measured: the ``dense`` network; the ``initial`` mask alone, and with normalisation
        statistics re-estimated (``initial_norm``); the ``jackpot``; or a comparator by its name, such as
        weights tuned under the initial mask (``initial_tuned``) or the jackpot's (``jackpot_tuned``, Eq. 9).
    accuracy
        Accuracy on the test images, in [0, 1]; None for text.
    sparsity
        Share of zeros among the weights of the pruned targets.
    epochs
        Epochs spent after pre-training.
    measures
        Other measures by name (`nni_jackpot.experiment.measures.MEASURES`); of text, the main one first.
    total_epochs
        Epochs with those of pre-training, if the method needs pre-trained weights; None if not known.
    seconds
        Time of the method, without pre-training; None if not known, as for an interrupted method.
    peak_memory_bytes
        Peak memory, of the GPU or of the process; None if not known.
    weights_changed
        Whether a kept weight differs from the pre-trained one; None if not known.
    overlap
        Overlap of the masks with the jackpot's (Eq. 7), in [0, 1]; None if not known.
    tokens
        Tokens, or images, of calibration data; None for methods that train.
    """

    kind: str
    accuracy: float | None
    sparsity: float
    epochs: int
    measures: dict[str, float] = field(default_factory=dict)
    total_epochs: int | None = None
    seconds: float | None = field(default=None, compare=False)  # a repeated run has other values
    peak_memory_bytes: int | None = field(default=None, compare=False)
    weights_changed: bool | None = None
    overlap: float | None = None
    tokens: int | None = None

    @property
    def values(self) -> dict[str, float]:
        """All measures by name, the main one first."""
        return self.measures if self.accuracy is None else {"accuracy": self.accuracy, **self.measures}

    @property
    def main(self) -> float:
        """The main measure."""
        return next(iter(self.values.values()))


@dataclass(frozen=True)
class Result:
    """What a search found, compared with its start.

    Attributes
    ----------
    rows
        Dense network, initial mask alone, the jackpot, and the comparators of the config.
    overlap
        Overlap of the jackpot with the initial mask (Eq. 7), in [0, 1].
    seconds
        Time of the search alone; of a resumed search, since it was resumed.
    folder
        Folder of ``start.pth`` (the initial masks), ``masks.pth``, ``jackpot.pth`` (the sparse network as a
        plain state dict) and the metrics.
    resumed_step
        Step at which the search was resumed; its last step if only a comparator was interrupted; 0 if nothing
        was interrupted.
    settings
        Settings of the run, as in its YAML file. None in results of an earlier version, whose settings are in
        ``config.yml`` in the folder.
    files
        Digests of the run's other files, by name.
    trial
        Number of the run in NNI's web portal, if the run is a trial of an NNI experiment.
    """

    rows: list[Row]
    overlap: float
    seconds: float
    folder: Path
    resumed_step: int = 0
    settings: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    trial: int | None = None

    def check_files(self, *names: str) -> None:
        """Check that files of the run's folder have the digests in the results.

        Raises
        ------
        RunFolderError
            If a file is missing, damaged, or belongs to another run.
        """
        for name in names:
            if name in self.files and self.files[name] != digest_of_file(self.folder / name):
                raise RunFolderError(f"{self.folder / name} is not of the run in {RESULTS}: run it again")


def save_result(result: Result, folder: Path | None = None) -> None:
    """Write the results of a run to its folder, or to another folder where the run works for now."""
    content = {**asdict(result), "folder": str(result.folder), _HASH: config_hash(result.settings)}
    text = json.dumps(content, indent=2) + "\n"
    replace_file((folder or result.folder) / RESULTS, lambda aside: aside.write_text(text, encoding="utf-8"))


def load_result(folder: Path) -> Result:
    """Read the results of a run from its folder, which may have been moved.

    Raises
    ------
    RunFolderError
        If the results are missing or damaged, or do not belong to the config beside them.
    ExperimentConfigError
        If that config is damaged.
    """
    result = _read_result(folder)
    made, beside = _settings_in(result), settings_of(load_config(folder / CONFIG, is_stored=True))
    if found := differences(made, beside):
        raise RunFolderError(f"{folder / RESULTS} is not of the config beside it: {found}; run it again")
    return result


def _read_result(folder: Path) -> Result:
    path = folder / RESULTS
    try:
        raw = json.loads(path.read_bytes())
        compared = (raw.get("settings") or {}).get("comparators") or {}
        rows = [_checked(_row(row), [*KINDS, *compared]) for row in raw["rows"]]
        if lacking := [kind for kind in _REQUIRED if kind not in {row.kind for row in rows}]:
            raise ValueError(f"found no row of kind {', '.join(lacking)}")
        settings = raw.get("settings")
        if raw.pop(_HASH, config_hash(settings)) != config_hash(settings):
            raise ValueError("found settings with the hash of others")
        result = Result(**{**raw, "rows": rows, "folder": folder})
        if not 0 <= result.overlap <= 1:
            raise ValueError(f"found an overlap of {result.overlap}, allowed: a number in [0, 1]")
        if result.trial is not None and type(result.trial) is not int:
            raise ValueError(f"found trial {result.trial!r}, allowed: a number or null")
        if settings is not None:
            stored_config(settings, "settings")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is not that of a run ({type(error).__name__}: {error}): run it again"
        ) from error
    return result


def _settings_in(result: Result) -> dict[str, Any]:
    """Return the settings that results belong to, by dotted name."""
    if result.settings is None:
        return settings_of(load_config(result.folder / CONFIG, is_stored=True))
    return settings_of(stored_config(result.settings))


def _row(raw: dict[str, Any]) -> Row:
    known = dict(raw)
    if spent := known.pop("spent", None):  # of an earlier version
        known |= {"tokens": spent["tokens"], "seconds": spent["seconds"]}
        known["peak_memory_bytes"] = int(2**30 * spent["gib"]) or None
    return Row(**known)


def _checked(row: Row, kinds: list[str]) -> Row:
    if row.kind not in kinds:
        raise ValueError(f"found a row of kind {row.kind!r}, allowed: {', '.join(kinds)}")
    if not (0 <= row.sparsity < 1 and row.epochs >= 0):
        raise ValueError(f"found {row}, allowed: accuracy and sparsity in [0, 1], epochs >= 0")
    if not row.values or not all(MEASURES[name].is_possible(value) for name, value in row.values.items()):
        raise ValueError(f"found {row}, allowed: measures in their range, accuracy and sparsity in [0, 1]")
    costs = [row.total_epochs, row.seconds, row.peak_memory_bytes, row.tokens]
    if not all(cost is None or 0 <= cost < inf for cost in costs):
        raise ValueError(f"found {row}, allowed: epochs, seconds, bytes and tokens >= 0")
    if row.overlap is not None and not 0 <= row.overlap <= 1:
        raise ValueError(f"found {row}, allowed: an overlap in [0, 1]")
    return row


def finished(config: RunConfig) -> Result | None:
    """Return the results in a config's folder if they are of the same settings; else None."""
    return finished_in(Path(config.output), config)


def finished_in(folder: Path, config: RunConfig) -> Result | None:
    """Return the results in a folder if settings and all files match the config; else None."""
    try:
        result = load_result(folder)
        result.check_files(*result.files)
    except JackpotError:  # there are no results, or they are damaged
        return None
    return None if differs(result, config) else result


def found_in(folder: Path) -> Result | None:
    """Return the results in a folder, without a look at other files; None if they cannot be read."""
    try:
        result = _read_result(folder)
        _settings_in(result)
    except JackpotError:
        return None
    return result


def differs(result: Result, config: RunConfig) -> str:
    """Return in words which settings of a run differ from a config; empty if none does."""
    return differences(_settings_in(result), settings_of(config))
