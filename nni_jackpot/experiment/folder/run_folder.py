"""A run's folder: owned by one process, and a finished run in it stays until another is finished.

A run works in its folder. Only where the results of a run are there, which it is to replace, it works in a
folder within, and takes their place at the end.
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
from nni_jackpot.experiment.config import RunConfig, dump_config, load_config, to_dict
from nni_jackpot.experiment.folder.pretrained import cache_path
from nni_jackpot.experiment.folder.result import (
    CONFIG,
    RESULTS,
    Result,
    differs,
    finished_in,
    found_in,
    save_result,
    settings_of,
)
from nni_jackpot.experiment.tracking import running_as_nni_trial
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
# What an interrupted run goes on from: the search, and weights that are tuned after it.
SEARCH = "checkpoint.pth"
TUNED = {kind: f"{kind}/epoch.pth" for kind in ("initial_tuned", "jackpot_tuned")}

_TICKETS = "jackpot.ticket", "jackpot.sparse"  # where export puts them
_METRICS, _EVENTS = "metrics.csv", "tensorboard"
_PRETRAIN = "pretrain"
_FILES = CONFIG, RESULTS, _METRICS, START, MASKS, JACKPOT, SEARCH
_EVENT_FOLDERS = [str(Path(phase, _EVENTS)) for phase in ("", _PRETRAIN, *TUNED)]
_ALL_FILES = *_FILES, *TUNED.values(), *(f"{phase}/{_METRICS}" for phase in (_PRETRAIN, *TUNED))

# The folder of a run that is to replace a finished one, and its name once it is whole.
_REPLACEMENT, _WHOLE = ".replacement", ".replacement.whole"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, owned by this process.

    Attributes
    ----------
    folder
        Where the run's files are in the end.
    work
        Where they are made: mostly the same.
    finished
        The results, if the run has been made already.
    """

    folder: Path
    work: Path
    finished: Result | None

    def begin(self, config: RunConfig) -> None:
        """Write the config of a run that begins or goes on, and remove logs of one that will not go on.

        Raises
        ------
        OutputFolderError
            If a file of the run could not be written.
        """
        if rank() != 0:
            return
        for name in _ALL_FILES:
            target_of(self.work / name)
            target_of(self.folder / name)
        if not (self.work / SEARCH).exists() and not _is_of(self.work, config):
            self.delete_stale_logs("", *TUNED)
        if _weights_of(self.work) != cache_path(config).name:
            self.delete_stale_logs(_PRETRAIN)
        dump_config(_in_full(config), self.work / CONFIG)

    def delete_stale(self, *names: str) -> None:
        """Remove files and folders of the run, if they are there."""
        if rank() == 0:
            _remove(*(self.work / name for name in names))

    def delete_stale_logs(self, *phases: str) -> None:
        """Remove the metrics of phases that begin anew; the empty name is that of the search."""
        self.delete_stale(*(str(Path(phase, name)) for phase in phases for name in (_METRICS, _EVENTS)))

    def finish(self, result: Result, config: RunConfig) -> Result:
        """Write the results, after all other files, and put the run where it belongs; rank 0 alone."""
        kinds = {row.kind for row in result.rows}
        self.delete_stale(*_TICKETS, *(kind for kind in TUNED if kind not in kinds))
        files = {name: digest_of_file(self.work / name) for name in (START, MASKS, JACKPOT)}
        result = replace(result, settings=to_dict(_in_full(config)), files=files)
        save_result(result, self.work)
        _tidy(self.work)
        _publish(self.folder)
        return result


def place_of(config: RunConfig) -> Path:
    """Return where a run's files are in the end: where NNI says, for a trial, or as the config says."""
    return Path(os.environ["NNI_OUTPUT_DIR"] if running_as_nni_trial() else config.output)


def check_free(config: RunConfig, overwrite: bool = False) -> None:
    """See that a run's folder holds no finished run of other settings.

    Raises
    ------
    OutputFolderError
        If it does, and that run is not to be overwritten.
    """
    folder = place_of(config)
    found = None if overwrite else found_in(folder)
    if found is not None and (other := differs(found, config)):
        raise OutputFolderError(
            f"{folder} holds a finished run of other settings: {other}. Choose another output, or replace "
            "that run by --overwrite"
        )


def finished_run(config: RunConfig, overwrite: bool = False) -> Result | None:
    """Return the results of a run that has been made already; None if it is to be made.

    Raises
    ------
    OutputFolderError
        If the run's folder holds a finished run of other settings that is not to be overwritten.
    """

    def find() -> Result | None:
        result = _finished_run(config, overwrite)
        if result is not None:
            with suppress(OutputFolderError), owned(result.folder):  # else it is for others to clear away
                _tidy(result.folder)
        return result

    return _by_first(find)


@contextmanager
def claimed(config: RunConfig, overwrite: bool = False) -> Iterator[RunFolder]:
    """Own the folder of a run for the block.

    Raises
    ------
    OutputFolderError
        If another process owns it, it cannot be written, or it holds a finished run of other settings that
        is not to be overwritten.
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
                remove_leftovers(*(work / name for name in (*_ALL_FILES, *_EVENT_FOLDERS)))
            if found is not None:
                _tidy(folder)
            return RunFolder(folder, work, found)

        yield _by_first(claim)


def _in_full(config: RunConfig) -> RunConfig:
    return replace(config, search=config.search.in_full())


def _by_first(work: Callable[[], T]) -> T:
    """Return what rank 0 gets, or raise its error, in all processes."""

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


def _is_of(folder: Path, config: RunConfig) -> bool:
    try:
        return settings_of(load_config(folder / CONFIG)) == settings_of(config)
    except ExperimentConfigError:
        return False


def _weights_of(folder: Path) -> str:
    """Return what stands for the pre-training of the run in a folder; empty if there is none."""
    try:
        return cache_path(load_config(folder / CONFIG)).name
    except ExperimentConfigError:
        return ""


def _tidy(folder: Path) -> None:
    """Remove what an interrupted run would have gone on from, of one that is finished."""
    _remove(*(folder / name for name in (SEARCH, *TUNED.values())))


def _publish(folder: Path) -> None:
    """Put a run that is whole in the place of another; also where a process was killed while it did so."""
    replacement, whole = folder / _REPLACEMENT, folder / _WHOLE
    with errors_of(folder):
        if (replacement / RESULTS).exists():
            _tidy(replacement)
            _remove(folder / RESULTS)  # the other run is not finished any more
            sync_folder(folder)
            names = {*_FILES, *_TICKETS, _EVENTS, *TUNED}
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
