"""A run's folder: owned by one process; a finished run in it stays until its replacement is finished.

A run works in its folder. If it replaces a finished run, it works in a subfolder, and moves its files at the
end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nni_jackpot.errors import ExperimentConfigError, JackpotError, OutputFolderError
from nni_jackpot.experiment.config import RunConfig, dump_config, load_config, settings_of, to_dict
from nni_jackpot.experiment.folder.pretrained import cache_path
from nni_jackpot.experiment.folder.result import (
    CONFIG,
    RESULTS,
    Result,
    differs,
    finished_in,
    found_in,
    save_result,
)
from nni_jackpot.experiment.tracking import running_as_nni_trial, trial_number
from nni_jackpot.runtime.distributed import broadcast_result, rank
from nni_jackpot.runtime.files import (
    digest_of_file,
    errors_of,
    made_folders,
    remove_leftovers,
    sync_folder,
    target_of,
)
from nni_jackpot.runtime.owner import owned

T = TypeVar("T")

START, MASKS, JACKPOT = "start.pth", "masks.pth", "jackpot.pth"
# The file that an interrupted search resumes from.
SEARCH = "checkpoint.pth"
# Folders of comparators: two by their own names, all others in a folder.
_TUNED, _COMPARATORS = ("initial_tuned", "jackpot_tuned"), "comparators"

_TICKETS = "jackpot.ticket", "jackpot.sparse", "deployed"  # where export and deploy put them
_METRICS, _EVENTS = "metrics.csv", "tensorboard"
_PRETRAIN = "pretrain"
_FILES = CONFIG, RESULTS, _METRICS, START, MASKS, JACKPOT, SEARCH

# The folder of a run that will replace a finished one, and its name once it is complete.
_REPLACEMENT, _WHOLE = ".replacement", ".replacement.whole"


def phase_of(comparator: str) -> str:
    """Return the folder of a comparator within the run's folder."""
    return comparator if comparator in _TUNED else f"{_COMPARATORS}/{comparator}"


def checkpoint_of(comparator: str) -> str:
    """Return the file, within the run's folder, that an interrupted comparator resumes from."""
    return f"{phase_of(comparator)}/epoch.pth"


def _phases(folder: Path, *names: str) -> list[str]:
    """Return the folders of comparators: named ones, the usual ones, and those found in a run's folder."""
    there = [path.name for path in sorted((folder / _COMPARATORS).glob("*")) if path.is_dir()]
    return list(dict.fromkeys(map(phase_of, (*_TUNED, *there, *names))))


def _all_files(folder: Path, config: RunConfig) -> list[str]:
    """Return the names of all files that a run writes."""
    phases = _phases(folder, *config.compared)
    own = [f"{phase}/{name}" for phase in phases for name in ("epoch.pth", _METRICS)]
    return [*_FILES, *own, f"{_PRETRAIN}/{_METRICS}"]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, owned by this process.

    Attributes
    ----------
    folder
        Final place of the run's files.
    work
        Folder in which the files are written; mostly the same.
    finished
        The results, if the run is finished already.
    """

    folder: Path
    work: Path
    finished: Result | None

    def begin(self, config: RunConfig) -> None:
        """Write the config of a run that begins or resumes; remove the logs of a run that will not resume.

        Raises
        ------
        OutputFolderError
            If a file of the run could not be written.
        """
        if rank() != 0:
            return
        for name in _all_files(self.work, config):
            target_of(self.work / name)
            target_of(self.folder / name)
        before = _config_in(self.work)
        is_other = before is None or settings_of(before) != settings_of(config)
        if is_other and not (self.work / SEARCH).exists():
            self.delete_stale_logs("", *_phases(self.work))
        if _weights_of(self.work) != cache_path(config).name:
            self.delete_stale_logs(_PRETRAIN)
        dump_config(config, self.work / CONFIG)

    def delete_stale(self, *names: str) -> None:
        """Remove files and folders of the run, if they exist."""
        if rank() == 0:
            _remove(*(self.work / name for name in names))

    def delete_stale_comparators(self) -> None:
        """Remove the files that comparators of another search would resume from."""
        self.delete_stale(*(f"{phase}/epoch.pth" for phase in _phases(self.work)))

    def delete_stale_logs(self, *phases: str) -> None:
        """Remove the metrics of phases that start over; the search has the empty name."""
        self.delete_stale(*(str(Path(phase, name)) for phase in phases for name in (_METRICS, _EVENTS)))

    def finish(self, result: Result, config: RunConfig) -> Result:
        """Write the results, after all other files, and move the run to its final place; rank 0 only."""
        own = {phase_of(row.kind) for row in result.rows}
        stale = [phase for phase in _phases(self.work) if phase not in own]
        if not any(phase.startswith(_COMPARATORS) for phase in own):
            stale.append(_COMPARATORS)
        self.delete_stale(*_TICKETS, *stale)
        files = {name: digest_of_file(self.work / name) for name in (START, MASKS, JACKPOT)}
        result = replace(result, settings=to_dict(config), files=files, trial=trial_number())
        save_result(result, self.work)
        _tidy(self.work)
        _publish(self.folder)
        return result


def place_of(config: RunConfig) -> Path:
    """Return the final place of a run's files: NNI's folder for a trial, else the folder of the config."""
    return Path(os.environ["NNI_OUTPUT_DIR"] if running_as_nni_trial() else config.output)


def check_free(config: RunConfig, overwrite: bool = False) -> None:
    """Check that a run's folder holds no finished run of other settings.

    Raises
    ------
    OutputFolderError
        If it does, and ``overwrite`` is false.
    """
    folder = place_of(config)
    found = None if overwrite else found_in(folder)
    if found is not None and (other := differs(found, config)):
        raise OutputFolderError(
            f"{folder} holds a finished run of other settings: {other}. Choose another output, or replace "
            "that run by --overwrite"
        )


def finished_run(config: RunConfig, overwrite: bool = False) -> Result | None:
    """Return the results of a run that is finished already; None if it must be made.

    Raises
    ------
    OutputFolderError
        If the run's folder holds a finished run of other settings, and ``overwrite`` is false.
    """

    def find() -> Result | None:
        result = _finished_run(config, overwrite)
        if result is not None:
            with suppress(OutputFolderError), owned(result.folder):  # else its owner tidies up
                _tidy(result.folder)
        return result

    return _by_first(find)


@contextmanager
def claimed(config: RunConfig, overwrite: bool = False) -> Iterator[RunFolder]:
    """Own the folder of a run for the block.

    Raises
    ------
    OutputFolderError
        If another process owns it, it cannot be written, or it holds a finished run of other settings and
        ``overwrite`` is false.
    """
    folder = place_of(config)
    with ExitStack() as stack:

        def claim() -> RunFolder:
            stack.enter_context(made_folders(folder))
            stack.enter_context(owned(folder))
            _publish(folder)
            found = _finished_run(config, overwrite)
            replaces = found is None and (folder / RESULTS).exists()
            work = folder / _REPLACEMENT if replaces else folder
            stack.enter_context(made_folders(work))
            with errors_of(work):
                events = [str(Path(phase, _EVENTS)) for phase in ("", _PRETRAIN, *_phases(work))]
                remove_leftovers(*(work / name for name in (*_all_files(work, config), *events)))
            if found is not None:
                _tidy(folder)
            return RunFolder(folder, work, found)

        yield _by_first(claim)


def _by_first(work: Callable[[], T]) -> T:
    """Return the result of rank 0, or raise its error, in all processes."""

    def attempt() -> tuple[T | None, JackpotError | None]:
        try:
            return work(), None
        except JackpotError as error:
            return None, error

    value, error = broadcast_result(attempt)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _finished_run(config: RunConfig, overwrite: bool) -> Result | None:
    check_free(config, overwrite)
    return None if overwrite else finished_in(place_of(config), config)


def _config_in(folder: Path) -> RunConfig | None:
    try:
        return load_config(folder / CONFIG, is_stored=True)
    except ExperimentConfigError:
        return None


def _weights_of(folder: Path) -> str:
    """Return the name of the cached weights of the run in a folder; empty if there is no run."""
    config = _config_in(folder)
    return "" if config is None else cache_path(config).name


def _tidy(folder: Path) -> None:
    """Remove the files that a finished run would have resumed from."""
    _remove(folder / SEARCH, *(folder / phase / "epoch.pth" for phase in _phases(folder)))


def _publish(folder: Path) -> None:
    """Move a complete run to the place of another; also if a process was killed while it did so."""
    replacement, whole = folder / _REPLACEMENT, folder / _WHOLE
    with errors_of(folder):
        if (replacement / RESULTS).exists():
            _tidy(replacement)
            _remove(folder / RESULTS)  # the other run is not finished any more
            sync_folder(folder)
            names = {*_FILES, *_TICKETS, _EVENTS, *_TUNED, _COMPARATORS}
            if _weights_of(folder) != _weights_of(replacement):
                names.add(_PRETRAIN)
            _remove(*(folder / name for name in names if not (replacement / name).exists()))
            os.rename(replacement, whole)
        if whole.exists():
            for file in sorted(whole.iterdir(), key=lambda file: file.name == RESULTS):
                if file.is_dir():
                    _remove(folder / file.name)
                sync_folder(folder)  # the results come last, on the disk as well
                os.replace(file, folder / file.name)
            whole.rmdir()
            sync_folder(folder)


def _remove(*paths: Path) -> None:
    for path in paths:
        with errors_of(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
