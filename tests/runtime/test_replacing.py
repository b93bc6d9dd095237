"""Writes are atomic, and change no other file."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nni_jackpot import save_masks
from nni_jackpot.errors import OutputFolderError
from nni_jackpot.runtime.files import (
    check_folder,
    made_folders,
    remove_leftovers,
    replace_file,
    replace_files,
    save_tensors,
    target_of,
)


def text(content: str) -> Callable[[Path], object]:
    return lambda temporary: temporary.write_text(content)


def never(temporary: Path) -> None:
    raise AssertionError("this place will not do, and is not to be written")


def failing(temporary: Path) -> None:
    temporary.write_text("ha")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


# -- temporary files


def test_two_writers_and_a_reader_never_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "file.txt", [40_000 * letter for letter in "ab"]

    def write(content: str) -> None:
        for _ in range(200):
            replace_file(path, text(content))

    def read() -> None:
        while not all(writer.done() for writer in writers):
            assert not path.exists() or path.read_text() in contents

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, content) for content in contents]
        reader = pool.submit(read)
    for done in (*writers, reader):
        done.result()
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("name", ["file.txt.part", ".file.txt.part", "file.txt.tmp"])
def test_a_link_that_was_planted_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "run" / "file.txt", text("new"))
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "run" / name).is_symlink()


def test_the_name_of_the_file_aside_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(4):
        replace_file(
            tmp_path / "file.txt", lambda temporary: names.add(temporary.name) or temporary.write_text("x")
        )
    assert len(names) == 4


@pytest.mark.parametrize(
    "name", [255 * "x", 85 * "數", 63 * "🎰"], ids=["ascii", "three bytes", "four bytes"]
)
def test_a_name_can_be_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    replace_file(tmp_path / name, text("new"))
    assert (tmp_path / name).read_text() == "new"
    assert os.listdir(tmp_path) == [name]


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    for name in ("a[1].txt", "b.txt"):
        replace_file(tmp_path / name, lambda temporary: os.link(temporary, f"{temporary}.part"))
    remove_leftovers(tmp_path / "a[1].txt")
    assert [path.name[:3] for path in sorted(tmp_path.glob("*.part"))] == [".b."]
    (tmp_path / "of a user.part").write_text("precious")
    remove_leftovers(tmp_path, tmp_path / "none")
    assert [path.name for path in tmp_path.glob("*.part")] == ["of a user.part"]


# -- existing files


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file.txt").write_text("old")
    (tmp_path / "far").symlink_to("real/file.txt")
    (tmp_path / "farther").symlink_to("far")
    (tmp_path / "dangling").symlink_to("real/none.txt")
    replace_file(tmp_path / "farther", text("new"))
    replace_file(tmp_path / "dangling", text("new"))
    assert (tmp_path / "farther").is_symlink()
    assert (tmp_path / "far").is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "real").iterdir()} == {
        "file.txt": "new",
        "none.txt": "new",
    }


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link to itself", "link to a device", "device"])
def test_what_is_no_file_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(tmp_path)  # for the path of a socket has up to 107 bytes
        server.bind("target")
        server.close()
    elif kind.startswith("link"):
        path.symlink_to("target" if kind == "link to itself" else "/dev/null")
    before = path.lstat()
    with pytest.raises(OutputFolderError, match=rf"cannot write {path}: .*allowed: a file, or nothing yet"):
        replace_file(path, never)
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert os.listdir(tmp_path) in ([], ["target"])


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_the_mode_of_a_file_stays(tmp_path: Path, umask: None, mode: int) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(mode)
    replace_file(path, text("new"))
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: None) -> None:
    replace_file(tmp_path / "file.txt", text("new"))
    save_masks({"conv": {"weight": torch.ones(2)}}, tmp_path / "masks.pth")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o640}


def test_file_and_folder_are_on_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), rename(*names)))
    replace_file(tmp_path / "file.txt", text("new"))
    assert events == ["file", "rename", "folder"]


# -- failures


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "there/new", "new/and/deeper"):
        with pytest.raises(OutputFolderError, match=r"cannot write .*x\.txt: No space left on device$"):
            replace_file(tmp_path / folder / "x.txt", failing)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(OutputFolderError, match="File name too long"):
        replace_file(tmp_path / "new" / (300 * "x") / "x.txt", never)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_folders_that_others_have_put_files_into_stay(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        (temporary.parent / "of another").write_text("precious")
        failing(temporary)

    with pytest.raises(OutputFolderError):
        replace_file(tmp_path / "new" / "x.txt", write)
    assert os.listdir(tmp_path / "new") == ["of another"]


def test_several_files_are_replaced_all_or_none(tmp_path: Path) -> None:
    replace_files({tmp_path / name: text("old") for name in "abc"})
    with pytest.raises(OutputFolderError, match="/c: No space left"):
        replace_files({tmp_path / "a": text("new"), tmp_path / "b": text("new"), tmp_path / "c": failing})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFolderError, match="is a folder"):
        replace_files({tmp_path / "a": never, tmp_path / "folder": never})
    replace_files({tmp_path / name: text("new") for name in "abc"})
    assert {(tmp_path / name).read_text() for name in "abc"} == {"new"}


def test_a_full_disk_is_said_of_tensors_too(tmp_path: Path) -> None:
    path = tmp_path / "masks.pth"
    save_masks({"conv": {"weight": torch.ones(2)}}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputFolderError, match=r"cannot write .*masks\.pth: File too large$"):
            save_masks({"conv": {"weight": torch.ones(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["masks.pth"]


def test_equal_tensors_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        replace_file(tmp_path / name, lambda temporary: save_tensors({"x": torch.arange(9)}, temporary))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


# -- checks of folders before writing


def test_a_place_can_be_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new" / "deeper")
    check_folder("new")
    assert target_of(tmp_path / "none") == Path(os.path.realpath(tmp_path / "none"))
    for folder in ("file", "file/below"):
        with pytest.raises(OutputFolderError, match=r"cannot write to .*file is not a folder"):
            check_folder(tmp_path / folder)
    assert os.listdir(tmp_path) == ["file"]


def test_folders_stay_where_the_block_goes_well(tmp_path: Path) -> None:
    with made_folders(tmp_path / "a" / "b", tmp_path / "a" / "c"):
        pass
    with pytest.raises(KeyError), made_folders(tmp_path / "a" / "b", tmp_path / "d"):
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "c"]
