"""Only one process at a time writes to a folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tiny_runs import command, files_in, write_file

from nni_jackpot.errors import OutputFolderError
from nni_jackpot.runtime import owner
from nni_jackpot.runtime.owner import owned


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Run code in a process that is killed at the end of the block."""
    number = os.fork()
    if not number:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield number
    finally:
        kill(number)


def kill(number: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


@pytest.fixture
def others(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Ids of a process that owns ``out``, and of its worker."""
    (tmp_path / "out").mkdir()
    ready, said = os.pipe()

    def work() -> None:
        with owned(tmp_path / "out"), child(signal.pause) as worker:
            os.write(said, f"{worker}".encode())
            signal.pause()

    with child(work) as number:
        worker = int(os.read(ready, 20))
        yield number, worker
    kill(worker)
    os.close(ready)
    os.close(said)


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):
        with owned(tmp_path):
            in_use = rf"^{tmp_path} is in use by process {os.getpid()}: wait until it ends, or choose another"
            for _ in range(2):
                with pytest.raises(OutputFolderError, match=in_use), owned(tmp_path):
                    pass
    assert os.listdir(tmp_path) == [".lock"]


def test_threads_are_owners_as_well(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> int:
        with suppress(OutputFolderError), owned(tmp_path):
            inside.append(number)
            found = len(inside)
            inside.remove(number)
            return found
        return 0

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(work, range(200))} <= {0, 1}


def test_the_owner_is_named_and_once_it_is_dead_it_is_none(tmp_path: Path, others: tuple[int, int]) -> None:
    number, worker = others
    with pytest.raises(OutputFolderError, match=f"in use by process {number}"), owned(tmp_path / "out"):
        pass
    kill(worker)
    kill(number)
    with owned(tmp_path / "out"):
        pass


def test_workers_of_a_dead_owner_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[int, int]
) -> None:
    number, worker = others
    kill(number)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        kill(worker)

    monkeypatch.setattr(owner.time, "sleep", sleep)
    with owned(tmp_path / "out"):
        assert waited


@pytest.mark.parametrize("settings", [(), ("seed=1",)], ids=["the same", "others"])
@pytest.mark.parametrize("name", ["search", "pretrain"])
def test_a_command_changes_nothing_in_a_folder_in_use(
    tmp_path: Path,
    others: tuple[int, int],
    capsys: pytest.CaptureFixture[str],
    name: str,
    settings: tuple[str, ...],
) -> None:
    before = files_in(tmp_path / "out")
    assert command(name, write_file(tmp_path), *settings) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"out is in use by process {others[0]}" in said
    assert files_in(tmp_path / "out") == before


def test_links_that_were_planted_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock.pid").symlink_to("../victim")
    with owned(tmp_path / "out"):
        pass
    (tmp_path / "out" / ".lock").unlink()
    (tmp_path / "out" / ".lock").symlink_to("../victim")
    with pytest.raises(OutputFolderError, match=r"\.lock is a link"), owned(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(OutputFolderError, match="cannot lock"), owned(folder):
            pass
