"""Where a run's metrics arrive: event files, CSV, progress bar and NNI."""

from __future__ import annotations

import csv
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from event_points import read_events
from nni.runtime.trial_command_channel import TrialCommandChannel

from nni_jackpot.errors import JackpotError, OutputFolderError
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.folder.run_folder import place_of
from nni_jackpot.experiment.tracking import (
    Tracker,
    report_final,
    running_as_nni_trial,
    trial_number,
    tuner_parameters,
)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class RecordingChannel(TrialCommandChannel):
    """NNI's side of a trial."""

    def __init__(self, parameters: dict[str, Any] | None) -> None:
        self.parameters = parameters
        self.metrics: list[tuple[str, int, Any]] = []

    def receive_parameter(self) -> Any:
        return None if self.parameters is None else {"parameter_id": 3, "parameters": self.parameters}

    def send_metric(self, type: str, parameter_id: int, trial_job_id: str, sequence: int, value: Any) -> None:
        self.metrics.append((type, sequence, value))


@pytest.fixture(autouse=True)
def standalone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NNI_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def nni_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingChannel:
    channel = RecordingChannel({"search.lr": 0.1})
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "trial"))
    monkeypatch.setattr("nni.runtime.trial_command_channel._channel", channel)
    monkeypatch.setattr(nni.trial, "_params", None)
    monkeypatch.setattr(nni.trial, "_intermediate_seq", 0)
    return channel


def test_tensorboard_shows_steps_epochs_and_densities(tmp_path: Path) -> None:
    with Tracker(tmp_path, 6, description="search", log_every=2) as tracker:
        for i in range(1, 6):
            tracker.step(torch.tensor(float(i), requires_grad=True), learning_rate=0.1 * i, flips=i)
        tracker.epoch(0.5, overlap=0.9, layers={"conv1": 0.25, "layer1.0.conv2": 0.75})
        tracker.step(6.0)
        tracker.epoch(0.75, overlap=0.8, layers={"conv1": 0.5})
    assert read_events(tmp_path / "tensorboard") == {
        "step/loss": [(2, 2.0), (4, 4.0), (6, 6.0)],
        "step/learning_rate": [(2, 0.2), (4, 0.4)],
        "step/flips": [(2, 2.0), (4, 4.0)],
        "epoch/accuracy": [(1, 0.5), (2, 0.75)],
        "epoch/loss": [(1, 3.0), (2, 6.0)],
        "epoch/overlap": [(1, 0.9), (2, 0.8)],
        "density/conv1": [(1, 0.25), (2, 0.5)],
        "density/layer1.0.conv2": [(1, 0.75)],
    }


def test_csv_has_a_row_per_epoch(tmp_path: Path) -> None:
    began = time.perf_counter()
    with Tracker(tmp_path, 4, description="search") as tracker:
        tracker.step(1.0, learning_rate=0.1, flips=7)
        tracker.step(torch.tensor(2.0), learning_rate=0.2, flips=torch.tensor(9))
        tracker.epoch(0.5, overlap=0.9)
        tracker.step(4.0, learning_rate=0.3)
        tracker.epoch(0.75)
    seconds = time.perf_counter() - began
    rows = read_rows(tmp_path)
    header = ["epoch", "step", "accuracy", "loss", "learning_rate", "flips", "overlap", "seconds"]
    assert list(rows[0]) == header
    assert [list(row.values())[:-1] for row in rows] == [
        ["1", "2", "0.5", "1.5", "0.2", "9.0", "0.9"],
        ["2", "3", "0.75", "4.0", "0.3", "", ""],
    ]
    # They are written with three digits after the point.
    assert 0 <= float(rows[0]["seconds"]) <= float(rows[1]["seconds"]) <= seconds + 0.001


def test_row_with_unknown_column_is_an_error(tmp_path: Path) -> None:
    with Tracker(tmp_path, 2, description="search") as tracker:
        tracker.epoch(0.5)
        with pytest.raises(ValueError, match="overlap"):
            tracker.epoch(0.5, overlap=0.9)


def test_epoch_before_any_step_has_no_loss(tmp_path: Path) -> None:
    with Tracker(tmp_path, 2, description="search") as tracker:
        tracker.epoch(0.5)
    assert read_rows(tmp_path)[0]["loss"] == "nan"


def test_rows_and_events_survive_an_interrupted_run(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Tracker(tmp_path, 10, description="search", log_every=1) as tracker:
            tracker.step(1.0)
            tracker.epoch(0.5)
            assert read_rows(tmp_path)[0]["accuracy"] == "0.5", "written before the end"
            tracker.step(2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_rows(tmp_path)) == 1
    assert read_events(tmp_path / "tensorboard")["step/loss"] == [(1, 1.0), (2, 2.0)]


def test_a_second_run_replaces_the_csv(tmp_path: Path) -> None:
    for accuracy in (0.5, 0.6):
        with Tracker(tmp_path, 1, description="search") as tracker:
            tracker.epoch(accuracy)
    assert [row["accuracy"] for row in read_rows(tmp_path)] == ["0.6"]


def test_a_resumed_run_takes_over_the_rows_of_its_first_part(tmp_path: Path) -> None:
    with Tracker(tmp_path, 6, description="search") as tracker:
        for accuracy in (0.5, 0.6):
            tracker.step(1.0)
            tracker.step(3.0)
            tracker.epoch(accuracy, overlap=0.9)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,6,0.")  # cut short
    first = read_rows(tmp_path)[:2]
    with Tracker(tmp_path, 6, description="search") as tracker:
        for _ in range(2):
            tracker.skip_step()
            tracker.skip_step()
            assert tracker.has_next_epoch()
            tracker.skip_epoch()
        tracker.step(2.0)
        tracker.step(2.0)
        assert not tracker.has_next_epoch()
        tracker.epoch(0.7, overlap=0.8)
    found = read_rows(tmp_path)
    assert found[:2] == first
    assert [(row["epoch"], row["step"], row["loss"], row["overlap"]) for row in found[2:]] == [
        ("3", "6", "2.0", "0.8")
    ]


def test_an_epoch_whose_beginning_is_not_known_has_no_loss(tmp_path: Path) -> None:
    with Tracker(tmp_path, 6, description="search") as tracker:
        for _ in range(2):
            tracker.skip_step()
        tracker.step(2.0)
        tracker.epoch(0.5)
        tracker.step(1.0)
        tracker.epoch(0.5)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [("3", ""), ("4", "1.0")]
    assert [step for step, _ in read_events(tmp_path / "tensorboard")["epoch/loss"]] == [2]


@pytest.mark.parametrize("steps", [4, 6, 7])
def test_points_beyond_a_resume_are_those_of_the_resumed_run(tmp_path: Path, steps: int) -> None:
    with Tracker(tmp_path, 9, description="search", log_every=1) as tracker:
        for step in range(1, 9):
            tracker.step(1.0)
            if step % 3 == 0:
                tracker.epoch(0.5)
    with Tracker(tmp_path, 9, description="search", log_every=1) as tracker:
        for step in range(1, steps + 1):
            tracker.skip_step()
            if step % 3 == 0:
                tracker.skip_epoch()
        for step in range(steps + 1, 10):
            tracker.step(2.0)
            if step % 3 == 0:
                tracker.epoch(0.75)
    events = read_events(tmp_path / "tensorboard")
    assert [value for _, value in events["step/loss"]] == [1.0] * steps + [2.0] * (9 - steps)
    assert [step for step, _ in events["step/loss"]] == list(range(1, 10))
    known = steps // 3
    accuracies = [0.5] * known + [0.75] * (3 - known)
    assert [value for _, value in events["epoch/accuracy"]] == accuracies
    assert [float(row["accuracy"]) for row in read_rows(tmp_path)] == accuracies
    seconds = [float(row["seconds"]) for row in read_rows(tmp_path)]
    assert seconds == sorted(seconds)


def test_points_of_another_run_go(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with Tracker(tmp_path, 3, description="search", log_every=1) as tracker:
            tracker.step(loss)
            tracker.epoch(0.5)
    events = read_events(tmp_path / "tensorboard")
    assert events["step/loss"] == [(1, 2.0)]
    assert len(events["epoch/accuracy"]) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"epoch,seconds\n1,x\n", b"a\0b", b"epoch\n1\n"])
def test_rows_that_are_damaged_are_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with Tracker(tmp_path, 2, description="search") as tracker:
        tracker.skip_step()
        assert not tracker.has_next_epoch()
        tracker.skip_epoch()
        tracker.step(1.0)
        tracker.epoch(0.5)
    assert [row["epoch"] for row in read_rows(tmp_path)] == ["2"]


def test_tensors_are_read_on_logged_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = torch.Tensor.__float__

    def recorded_read(tensor: torch.Tensor) -> float:
        reads.append(step)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "__float__", recorded_read)
    monkeypatch.setattr(torch.Tensor, "item", None)
    with Tracker(tmp_path, 6, description="search", log_every=3) as tracker:
        for step in range(1, 7):
            tracker.step(torch.tensor(1.0), flips=torch.tensor(step))
    assert set(reads) == {3, 6}


def test_the_graph_of_a_loss_is_not_kept(tmp_path: Path) -> None:
    with Tracker(tmp_path, 2, description="search") as tracker:
        weight = torch.ones(4, requires_grad=True)
        for _ in range(2):
            tracker.step((saved := weight * 2).pow(2).sum())
            tensor = weakref.ref(saved)
            del saved
            assert tensor() is None


def test_mean_of_half_precision_losses_is_exact(tmp_path: Path) -> None:
    with Tracker(tmp_path, 1000, description="search") as tracker:
        for _ in range(1000):
            tracker.step(torch.tensor(1.5, dtype=torch.bfloat16))
        tracker.epoch(0.5)
    assert read_rows(tmp_path)[0]["loss"] == "1.5"


def test_other_ranks_are_silent(
    tmp_path: Path,
    nni_trial: RecordingChannel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Tracker(tmp_path / "run", 2, description="search", log_every=1, rank=1) as tracker:
        tracker.step(torch.tensor(1.0), flips=1)
        tracker.epoch(0.5, layers={"conv1": 0.5})
    monkeypatch.setattr("nni_jackpot.experiment.tracking.rank", lambda: 1)
    report_final(0.5)
    assert not list(tmp_path.iterdir())
    assert nni_trial.metrics == []
    assert capfd.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Tracker(tmp_path, 2, description="jackpot", log_every=1) as tracker:
        tracker.step(0.25)
        tracker.epoch(0.5)
        tracker.step(0.125)
    out, err = capsys.readouterr()
    last_line = err.rstrip("\n").split("\r")[-1]
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert last_line.startswith("jackpot: 100%")
    assert "loss=0.125" in last_line
    assert "accuracy=0.5" in last_line


def test_lines_and_no_progress_bar_without_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, 1, description="search", log_every=1) as tracker:
        tracker.step(1.0)
        tracker.epoch(0.5)
    report_final(0.5)
    out, err = capfd.readouterr()
    assert out.splitlines() == ["search: step 1 of 1, epoch 1, loss 1.0000, accuracy 50.00 %"]
    assert err == ""


def test_nni_gets_intermediate_and_final_results(
    tmp_path: Path, nni_trial: RecordingChannel, config: RunConfig
) -> None:
    assert running_as_nni_trial()
    assert tuner_parameters() == {"search.lr": 0.1}
    with Tracker(place_of(config), 2, description="search") as tracker:
        tracker.step(1.0, learning_rate=0.1)
        tracker.epoch(0.5, sparsity=0.4, overlap=0.9)
        tracker.epoch(0.75)
    report_final(0.75, sparsity=0.8, overlap=0.7)
    assert nni_trial.metrics == [
        ("PERIODICAL", 0, {"default": 0.5, "sparsity": 0.4, "overlap": 0.9}),
        ("PERIODICAL", 1, {"default": 0.75}),
        ("FINAL", 0, {"default": 0.75, "sparsity": 0.8, "overlap": 0.7}),
    ]
    assert not Path(config.output).exists()
    assert read_events(tmp_path / "trial" / "tensorboard")["epoch/accuracy"] == [(1, 0.5), (2, 0.75)]


def test_number_of_a_trial(nni_trial: RecordingChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial_number() is None
    monkeypatch.setenv("NNI_TRIAL_SEQ_ID", "11")
    assert trial_number() == 11


def test_no_parameters_from_a_stopped_experiment(nni_trial: RecordingChannel) -> None:
    nni_trial.parameters = None
    with pytest.raises(JackpotError, match="closed"):
        tuner_parameters()


def test_standalone_does_not_ask_nni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_next_parameter", "report_intermediate_result", "report_final_result"):
        monkeypatch.setattr(nni, name, None)
    assert not running_as_nni_trial()
    assert tuner_parameters() == {}
    folder = tmp_path / "a" / "b"
    with Tracker(folder, 1, description="search") as tracker:
        assert folder.is_dir()
        tracker.epoch(0.5)
    report_final(0.5)
    assert trial_number() is None


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputFolderError, match="file"):
            Tracker(path, 1, description="search")


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(OutputFolderError, match="Permission denied"):
        Tracker(tmp_path, 1, description="search")
