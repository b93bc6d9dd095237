"""Metrics of a run, for NNI, TensorBoard, tracking services, a CSV file and the progress display."""

from __future__ import annotations

import csv
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nni_jackpot.errors import CheckpointError, Interrupted, JackpotError
from nni_jackpot.experiment.measures import MEASURES
from nni_jackpot.experiment.services import Services
from nni_jackpot.experiment.services.events import EventFile
from nni_jackpot.runtime.distributed import rank
from nni_jackpot.runtime.files import errors_of, replace_file
from nni_jackpot.runtime.progress import Progress

Scalar = float | torch.Tensor

# Keys and types of a tracker's state.
_STATE = {"step": int, "epoch_steps": int, "loss_sum": float, "seconds": float}

# Scalars of an epoch that NNI gets beside the measure.
_SHOWN_BY_NNI = "sparsity", "overlap"


def running_as_nni_trial() -> bool:
    """Return whether this process is a trial of an NNI experiment."""
    return "NNI_PLATFORM" in os.environ


def tuner_parameters() -> dict[str, object]:
    """Return the parameters that NNI's tuner chose for this trial; empty outside of NNI.

    Call it once a trial and in one process: NNI answers one request, and a second request waits forever.
    Raises JackpotError if NNI has closed the connection, as it does when the experiment is stopped.
    """
    if not running_as_nni_trial():
        return {}
    import nni

    parameters = nni.get_next_parameter()
    if parameters is None:
        raise JackpotError("NNI has closed the connection to this trial, no parameters were received")
    return dict(parameters)


def report_final(measured: float, **others: float) -> None:
    """Report a run's final measures to NNI if this process is a trial of an NNI experiment.

    Parameters
    ----------
    measured
        What the tuner compares trials by, such as the accuracy as a fraction.
    **others
        Other columns of the web portal's table, such as ``overlap``.
    """
    if running_as_nni_trial() and rank() == 0:
        import nni

        nni.report_final_result({"default": measured, **others})


def trial_number() -> int | None:
    """Return the number of this trial in NNI's web portal; None outside of NNI."""
    number = os.environ.get("NNI_TRIAL_SEQ_ID", "")
    return int(number) if running_as_nni_trial() and number.isdecimal() else None


class Tracker:
    """Send a run's metrics to NNI, TensorBoard, a CSV file, and a progress bar or lines on stdout.

    A context manager that turns an interruption into `Interrupted`. On ranks other than 0 it creates no file
    and all methods do nothing. Raises OutputFolderError if the folder cannot be created or written.

    A resumed run first counts the steps and epochs of the earlier process, by `skip_step` and `skip_epoch`.
    Rows and points of the earlier process up to there are kept; later ones are replaced.

    Parameters
    ----------
    folder
        Folder of ``metrics.csv``, and of an event file in ``tensorboard``. Files of an earlier run are
        replaced at the end of the first epoch, and at the first logged step.
    total_steps
        Training steps of the whole run.
    description
        Name of the phase, for the bar that appears if stderr is a terminal, and otherwise for the lines that
        are printed after each epoch and every half minute.
    log_every
        Steps between logged steps.
    rank
        Rank of this process in distributed training.
    report_to_nni
        Whether a trial of NNI reports the measure.
    measure
        Name of the measure of an epoch, and of its column.
    services
        Tracking services, which get the values that TensorBoard gets.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        description: str,
        log_every: int = 10,
        rank: int = 0,
        report_to_nni: bool = True,
        measure: str = "accuracy",
        services: Services | None = None,
    ) -> None:
        self._silent = rank != 0
        if self._silent:
            return
        _make_writable(folder)
        self._log_every = log_every
        self._measure = measure
        self._reports = report_to_nni and running_as_nni_trial()
        # The subfolder of a trial's output folder that NNI's web portal asks for.
        self._event_folder = folder / "tensorboard"
        self._events: EventFile | None = None
        self._services = services
        self._path = folder / "metrics.csv"
        self._rows_on_file = _read_rows(self._path)
        self._rows: list[Mapping[str, object]] = []
        self._progress = Progress(description, total_steps)
        self._description = description
        self._shown: dict[str, float] = {}
        self._start = time.perf_counter()
        self._seconds_before = 0.0
        self._epochs = self._epoch_steps = 0
        self._skipped = (0, 0)  # steps and epochs
        self._resumed: Mapping[str, Any] = {}
        self._has_noted = False
        self._loss_sum: Scalar | None = 0.0  # None if the first steps of the epoch are not known
        self._scalars: dict[str, Scalar] = {}

    def note(self, loss: Scalar) -> None:
        """Record the loss of the step before the step ends, so that `state_dict` has it."""
        if not self._silent:
            self._epoch_steps += 1
            self._has_noted = True
            if self._loss_sum is not None:
                self._loss_sum = self._loss_sum + _detached(loss)

    def step(self, loss: Scalar, **scalars: Scalar) -> None:
        """Record a training step.

        Every ``log_every`` steps, the batch's loss and the scalars, such as ``learning_rate``, go to
        TensorBoard as ``step/<name>``. Tensors are read at these steps only: other steps do not wait for the
        device.
        """
        if self._silent:
            return
        if not self._has_noted:
            self.note(loss)
        self._has_noted = False
        self._progress.step()
        self._scalars = {name: _detached(value) for name, value in {"loss": loss, **scalars}.items()}
        if self._progress.steps % self._log_every == 0:
            values = {name: float(value) for name, value in self._scalars.items()}
            self._add_points(self._progress.steps, "step", values)
            self._shown["loss"] = values["loss"]
            self._progress.show(self._shown)
        if self._progress.line_is_due:
            self.line()

    def epoch(self, measured: float, *, layers: Mapping[str, float] | None = None, **scalars: Scalar) -> None:
        """Record the end of an epoch; under NNI an intermediate result: the measure, sparsity and overlap.

        ``metrics.csv`` gets a row: epoch and step (from 1), the measure, loss (mean over the epoch's steps;
        NaN without steps, blank if an earlier process took some of them), the scalars of the last step and of
        this call, seconds since the start. The first row fixes the columns: a later row leaves missing values
        blank, and raises ValueError for additional ones.

        Parameters
        ----------
        measured
            Measure on held-out data, such as the accuracy as a fraction.
        layers
            Share of weights kept by layer, for TensorBoard: ``density/<layer>``.
        **scalars
            Other values of the epoch, such as ``overlap``; in TensorBoard ``epoch/<name>``.
        """
        if self._silent:
            return
        self._epochs += 1
        values = {self._measure: measured}
        if self._loss_sum is not None:
            values["loss"] = float(self._loss_sum) / self._epoch_steps if self._epoch_steps else math.nan
        values |= {name: float(value) for name, value in scalars.items()}
        self._loss_sum, self._epoch_steps = 0.0, 0
        self._add_points(self._epochs, "epoch", values)
        self._add_points(self._epochs, "density", layers or {})
        self._write_row(values)
        self._shown[self._measure] = measured
        self._progress.show(self._shown, refresh=True)
        loss = {"loss": f"{values['loss']:.4f}"} if "loss" in values else {}
        shown = f"{100 * measured:.2f} %" if MEASURES[self._measure].is_percent else f"{measured:.4f}"
        self._progress.line({"epoch": f"{self._epochs}", **loss, self._measure: shown})
        if self._reports:
            import nni

            beside = {name: value for name, value in values.items() if name in _SHOWN_BY_NNI}
            nni.report_intermediate_result({"default": measured, **beside})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for a resumed run to have the same metrics."""
        if self._silent or self._loss_sum is None:
            return {}
        return {
            "step": self._progress.steps + self._has_noted,
            "epoch_steps": self._epoch_steps,
            "loss_sum": float(self._loss_sum),
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, once as many steps have been skipped.

        Raises
        ------
        CheckpointError
            If the state is damaged.
        """
        kinds = {name: type(value) for name, value in state.items()} if isinstance(state, dict) else None
        if kinds not in ({}, _STATE):
            raise CheckpointError(f"the checkpoint holds no state of a tracker, but {state}")
        self._resumed = state

    def skip_step(self) -> None:
        """Count a step of the earlier process of a resumed run."""
        if self._silent:
            return
        self._progress.skip()
        self._skipped = (self._progress.steps, self._epochs)
        self._loss_sum = None
        if self._resumed.get("step") == self._progress.steps:
            self._loss_sum, self._epoch_steps = self._resumed["loss_sum"], self._resumed["epoch_steps"]
            self._seconds_before, self._start = self._resumed["seconds"], time.perf_counter()

    def has_next_epoch(self) -> bool:
        """Return True if an earlier process wrote the row of the current epoch."""
        return not self._silent and self._epochs + 1 in self._rows_on_file

    def skip_epoch(self) -> None:
        """Count an epoch of the earlier process, and keep its row."""
        if self._silent:
            return
        self._epochs += 1
        self._skipped = (self._progress.steps, self._epochs)
        self._loss_sum, self._epoch_steps = 0.0, 0
        if (row := self._rows_on_file.get(self._epochs)) is not None:
            self._rows.append(row)
            self._seconds_before = float(row["seconds"])

    def skip_epochs(self, count: int, steps: int) -> None:
        """Count epochs of an earlier process, each with the given number of steps."""
        for _ in range(count):
            for _ in range(steps):
                self.skip_step()
            self.skip_epoch()

    def line(self) -> None:
        """Print a line with the progress and the last loss, unless there is a bar."""
        if not self._silent:
            self._progress.line({"loss": f"{float(self._scalars['loss']):.4f}"})

    def _add_points(self, at: int, group: str, values: Mapping[str, float]) -> None:
        if self._events is None:  # all steps of the earlier process have been counted by now
            steps, epochs = self._skipped
            self._events = EventFile(
                self._event_folder, lambda tag, at: at <= (steps if tag.startswith("step/") else epochs)
            )
        named = {f"{group}/{name}": value for name, value in values.items()}
        self._events.add(at, named)
        if self._services is not None and named:
            self._services.add("step" if group == "step" else "epoch", at, named)

    def _write_row(self, values: Mapping[str, float]) -> None:
        row: dict[str, object] = {"epoch": self._epochs, "step": self._progress.steps}
        row |= {self._measure: values[self._measure], "loss": None}
        row |= {name: float(value) for name, value in self._scalars.items() if name != "loss"}
        row |= {**values, "seconds": round(self._seconds(), 3)}
        self._write([*self._rows, row])
        self._rows.append(row)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def _write(self, rows: Sequence[Mapping[str, object]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                if rows:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)

        replace_file(self._path, write)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._silent:
            return
        self._progress.close()
        if self._services is not None:
            self._services.close()
        if error is None:
            self._write(self._rows)  # also without any epoch
        if kind is KeyboardInterrupt:
            raise Interrupted(f"at {self._progress} ({self._description})") from error


def _read_rows(path: Path) -> dict[int, dict[str, str]]:
    """Return the rows of an earlier ``metrics.csv`` by epoch, without truncated or damaged rows."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    except (FileNotFoundError, UnicodeDecodeError, csv.Error):
        return {}
    return {int(row["epoch"]): row for row in rows if _is_number(row, "epoch") and _is_number(row, "seconds")}


def _is_number(row: Mapping[str, str], column: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", row.get(column, "")))


def _detached(value: Scalar) -> Scalar:
    # Without the graph, which would live as long as the tracker; float32 for sums of half precision.
    return value.detach().float() if isinstance(value, torch.Tensor) else value


def _make_writable(folder: Path) -> None:
    with errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not apply to root, or to a read-only file system.
        with tempfile.TemporaryFile(dir=folder):
            pass
