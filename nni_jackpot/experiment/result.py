"""What a run leaves behind for others to read: its results, beside the config that they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nni_jackpot.errors import ExperimentConfigError, RunFolderError
from nni_jackpot.experiment.config import RunConfig, load_config, to_dict
from nni_jackpot.files import replace_file

RESULTS = "results.json"

# The kinds of rows that a run can have, of which each has the first four.
KINDS = ("dense", "initial", "initial_norm", "jackpot", "initial_tuned", "jackpot_tuned")

# What two runs may differ in and still give the same results; random seeds aside.
_OF_NO_CONSEQUENCE = {
    "output",
    "device",
    "data.workers",
    "data.download",
    "pretrain.cache",
    "search.checkpoint_every",
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
    """

    rows: list[Row]
    overlap: float
    seconds: float
    folder: Path
    resumed_step: int = 0


def save_result(result: Result) -> None:
    """Write the results of a run to its folder."""
    text = json.dumps({**asdict(result), "folder": str(result.folder)}, indent=2) + "\n"
    replace_file(result.folder / RESULTS, lambda aside: aside.write_text(text, encoding="utf-8"))


def load_result(folder: Path) -> Result:
    """Read the results of a run from its folder, wherever that has been moved to.

    Raises
    ------
    RunFolderError
        If they are missing or damaged.
    """
    path = folder / RESULTS
    try:
        raw = json.loads(path.read_bytes())
        rows = [_checked(Row(**row)) for row in raw["rows"]]
        if lacking := [kind for kind in KINDS[:4] if kind not in {row.kind for row in rows}]:
            raise ValueError(f"found no row of kind {', '.join(lacking)}")
        result = Result(**{**raw, "rows": rows, "folder": folder})
        if not 0 <= result.overlap <= 1:
            raise ValueError(f"found an overlap of {result.overlap}, allowed: a number in [0, 1]")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is not that of a run ({type(error).__name__}: {error}): run it again"
        ) from error
    return result


def _checked(row: Row) -> Row:
    if row.kind not in KINDS:
        raise ValueError(f"found a row of kind {row.kind!r}, allowed: {', '.join(KINDS)}")
    if not (0 <= row.accuracy <= 1 and 0 <= row.sparsity < 1 and row.epochs >= 0):
        raise ValueError(f"found {row}, allowed: accuracy and sparsity in [0, 1], epochs >= 0")
    return row


def finished(config: RunConfig) -> Result | None:
    """Return the results of a run that has been made already, with settings that give the same; else None."""
    folder = Path(config.output)
    if not (folder / RESULTS).exists() or not _is_of(folder, config):
        return None
    return load_result(folder)


def forget_other(folder: Path, config: RunConfig) -> None:
    """Remove results of other settings from the folder of a run whose config is about to be written there."""
    if not _is_of(folder, config):
        (folder / RESULTS).unlink(missing_ok=True)


def _is_of(folder: Path, config: RunConfig) -> bool:
    try:
        made = load_config(folder / "config.yml")
    except ExperimentConfigError:
        return False
    return settings_of(made) == settings_of(config)


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
