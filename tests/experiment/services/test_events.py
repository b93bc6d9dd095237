"""Each TensorBoard point is written once, and a full disk is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from event_points import read_events

from nni_jackpot.errors import OutputFolderError
from nni_jackpot.experiment.services.events import EventFile


def points(folder: Path, tag: str) -> list[int]:
    return [step for step, _ in read_events(folder).get(tag, [])]


def everything(tag: str, step: int) -> bool:
    return True


def test_points_of_earlier_files_are_taken_over_once(tmp_path: Path) -> None:
    for first in (1, 2, 4):
        file = EventFile(tmp_path, lambda tag, step, first=first: step < first)
        for step in range(first, first + 3):
            file.add(step, {"a": 0.5 * step, "b": 1.0})
    assert points(tmp_path, "a") == points(tmp_path, "b") == [1, 2, 3, 4, 5, 6]
    assert len(os.listdir(tmp_path)) == 1


def test_a_point_that_two_files_hold_is_taken_over_once(tmp_path: Path) -> None:
    EventFile(tmp_path, everything).add(1, {"a": 1.0})
    (file,) = tmp_path.iterdir()
    file.with_name(f"{file.name}.2").write_bytes(file.read_bytes())
    EventFile(tmp_path, everything).add(2, {"a": 2.0})
    assert points(tmp_path, "a") == [1, 2]


@pytest.mark.parametrize("cut", [1, 5, 13, 30])
@pytest.mark.parametrize("end", [b"", b"\0" * 40, bytes(range(60, 124))])
def test_what_is_damaged_ends_a_file(cut: int, end: bytes, tmp_path: Path) -> None:
    EventFile(tmp_path, everything).add(1, {"a": 1.0})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    EventFile(tmp_path, everything).add(2, {"a": 2.0})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: len(whole) + cut] + end)
    EventFile(tmp_path, everything)
    assert points(tmp_path, "a") == [1]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.foreign").write_bytes(b"nonsense")
    EventFile(tmp_path, everything).add(1, {"a": 1.0})
    assert points(tmp_path, "a") == [1]


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = EventFile(tmp_path, everything)
    file.add(3, {"step/loss": 0.25})
    file.add(4, {"step/loss": 0.5})
    read = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in read.Scalars("step/loss")] == [(3, 0.25), (4, 0.5)]


def test_a_full_disk_is_an_error_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = EventFile(tmp_path, everything)
    file.add(1, {"a": 1.0})
    is_full = True
    open_file = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if is_full and mode == "ab":
            return open_file(Path("/dev/full"), mode, *args, **kwargs)
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    for _ in range(50):  # more than any queue holds
        with pytest.raises(OutputFolderError, match=r"cannot write .*tfevents.*No space left"):
            file.add(2, {"a": 2.0})
    is_full = False  # there is room again
    file.add(2, {"a": 2.0})
    assert points(tmp_path, "a") == [1, 2]
