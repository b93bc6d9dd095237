"""Where a run's metrics go: NNI, TensorBoard, a CSV file and a progress bar."""

from __future__ import annotations

import csv
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nni
import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

from nni_jackpot.errors import JackpotError, OutputFolderError
from nni_jackpot.files import replace_file

Scalar = float | torch.Tensor


def running_as_nni_trial() -> bool:
    """Return whether this process is a trial of an NNI experiment."""
    return "NNI_PLATFORM" in os.environ


def tuner_parameters() -> dict[str, object]:
    """Return the parameters that NNI's tuner chose for this trial; none standalone.

    Call it once a trial and in one process: NNI answers one request, and a second one waits for ever.
    Raises JackpotError if NNI has closed the connection, as it does when the experiment is stopped.
    """
    if not running_as_nni_trial():
        return {}
    parameters = nni.get_next_parameter()
    if parameters is None:
        raise JackpotError("NNI has closed the connection to this trial, no parameters were received")
    return dict(parameters)


def output_folder(default: Path) -> Path:
    """Return the folder for a run's files, created: NNI's own for a trial, else ``default``.

    Raises OutputFolderError if it cannot be created or written.
    """
    folder = Path(os.environ["NNI_OUTPUT_DIR"]) if running_as_nni_trial() else default
    _make_writable(folder)
    return folder


class Tracker:
    """Carry a run's metrics to NNI, TensorBoard, a CSV file and a progress bar.

    A context manager. On ranks other than 0 it creates nothing and all methods are silent. Raises
    OutputFolderError if the folder cannot be created or written.

    Parameters
    ----------
    folder
        Gets ``metrics.csv``, and the event files in ``tensorboard``. The file of an earlier run is replaced
        at the end of the first epoch; a run that is resumed takes over its rows by `skip_epoch`.
    total_steps
        Training steps of the whole run, for the progress bar.
    description
        Text before the progress bar, which appears on a terminal only.
    log_every
        Steps from one logged step to the next.
    rank
        Rank of this process in distributed training.
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
    ) -> None:
        self._silent = rank != 0
        if self._silent:
            return
        _make_writable(folder)
        self._log_every = log_every
        self._reports = report_to_nni and running_as_nni_trial()
        # The subfolder of a trial's output folder that NNI's web portal asks for.
        self._events = SummaryWriter(str(folder / "tensorboard"))
        self._path = folder / "metrics.csv"
        self._rows_on_file = _read_rows(self._path)
        self._rows: list[Mapping[str, object]] = []
        self._bar = tqdm(total=total_steps, desc=description, unit="step", disable=None)
        self._postfix: dict[str, float] = {}
        self._start = time.perf_counter()
        self._epochs = self._steps = self._epoch_steps = 0
        self._loss_sum: Scalar = 0.0
        self._scalars: dict[str, Scalar] = {}

    def step(self, loss: Scalar, **scalars: Scalar) -> None:
        """Take note of a training step.

        Every ``log_every`` steps the batch's loss and the scalars, such as ``learning_rate``, go to
        TensorBoard as ``step/<name>``. Tensors are read on those steps only: the others need not wait
        for the device.
        """
        if self._silent:
            return
        self._steps += 1
        self._epoch_steps += 1
        self._scalars = {name: _detached(value) for name, value in {"loss": loss, **scalars}.items()}
        self._loss_sum = self._loss_sum + self._scalars["loss"]
        if self._steps % self._log_every == 0:
            for name, value in self._scalars.items():
                self._events.add_scalar(f"step/{name}", float(value), self._steps)
            self._postfix["loss"] = float(self._scalars["loss"])
            self._bar.set_postfix(self._postfix, refresh=False)
        self._bar.update()

    def epoch(self, accuracy: float, *, layers: Mapping[str, float] | None = None, **scalars: Scalar) -> None:
        """Take note of the end of an epoch; under NNI the accuracy is reported as an intermediate result.

        ``metrics.csv`` gets a row: epoch and step (both from 1), accuracy, loss (mean over the epoch's steps;
        NaN without any), the scalars of the last step and those given here, seconds since the start. The
        first row fixes the columns: what a later row lacks is left blank, what it has more is a ValueError.

        Parameters
        ----------
        accuracy
            Accuracy on held-out data, as a fraction.
        layers
            Share of weights kept by layer, for TensorBoard: ``density/<layer>``.
        **scalars
            Other values of the epoch, such as ``overlap``; in TensorBoard ``epoch/<name>``.
        """
        if self._silent:
            return
        self._epochs += 1
        loss = float(self._loss_sum) / self._epoch_steps if self._epoch_steps else math.nan
        values = {"accuracy": accuracy, "loss": loss}
        values |= {name: float(value) for name, value in scalars.items()}
        self._loss_sum, self._epoch_steps = 0.0, 0
        for name, value in values.items():
            self._events.add_scalar(f"epoch/{name}", value, self._epochs)
        for layer, density in (layers or {}).items():
            self._events.add_scalar(f"density/{layer}", density, self._epochs)
        self._events.flush()
        self._write_row(values)
        self._postfix["accuracy"] = accuracy
        self._bar.set_postfix(self._postfix)
        if self._reports:
            nni.report_intermediate_result(accuracy)

    def skip_step(self) -> None:
        """Count a step that an earlier process took, of the run that this one resumes."""
        if not self._silent:
            self._steps += 1
            self._bar.update()

    def has_next_epoch(self) -> bool:
        """Return whether an earlier process wrote the row of the epoch that ends now."""
        return not self._silent and self._epochs + 1 in self._rows_on_file

    def skip_epoch(self) -> None:
        """Count an epoch of an earlier process, and take over its row."""
        if self._silent:
            return
        self._epochs += 1
        if (row := self._rows_on_file.get(self._epochs)) is not None:
            self._rows.append(row)

    def final(self, accuracy: float) -> None:
        """Report the run's final accuracy, a fraction, to NNI if this is a trial."""
        if running_as_nni_trial() and not self._silent:
            nni.report_final_result(accuracy)

    def _write_row(self, values: Mapping[str, float]) -> None:
        row: dict[str, float] = {"epoch": self._epochs, "step": self._steps, "accuracy": values["accuracy"]}
        row |= {name: float(value) for name, value in self._scalars.items()}
        row |= {**values, "seconds": round(time.perf_counter() - self._start, 3)}
        self._write([*self._rows, row])
        self._rows.append(row)

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

    def __exit__(self, *exception: object) -> None:
        if not self._silent:
            self._bar.close()
            self._events.close()
            if not any(exception):
                self._write(self._rows)  # also where there has been no epoch


def _read_rows(path: Path) -> dict[int, dict[str, str]]:
    """Return the rows of an earlier ``metrics.csv`` by their epoch; a last one cut short is left out."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return {int(row["epoch"]): row for row in rows if row.get("epoch", "").isdecimal()}


def _detached(value: Scalar) -> Scalar:
    # Without the graph, which would else live as long as the tracker; float32, for sums of half precision.
    return value.detach().float() if isinstance(value, torch.Tensor) else value


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits tell too little: nothing to root, nor on a read-only file system.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFolderError(f"cannot write to the output folder {folder}: {error}") from error
