"""One TensorBoard event file that contains each point once."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from nni_jackpot.runtime.files import errors_of, replace_file

_PATTERN = "events.out.tfevents.*"


class EventFile:
    """An event file that merges the earlier event files of its folder and replaces them.

    TensorboardX writes from a thread, and a full disk makes the run wait for that thread forever. This class
    writes in the calling thread; a point is in the file when `add` returns.

    Parameters
    ----------
    folder
        Folder of the new file and of the earlier ones.
    stays
        Returns True for the tag and step of an earlier point that belongs to this run.

    Raises
    ------
    OutputFolderError
        If the file cannot be written; `add` raises it too.
    """

    def __init__(self, folder: Path, stays: Callable[[str, int], bool]) -> None:
        earlier = sorted(folder.glob(_PATTERN))
        points = {
            (value.tag, event.step): event
            for path in earlier
            for event in _read(path)
            for value in event.summary.value
            if stays(value.tag, event.step)
        }
        now = time.time()
        self._path = folder / f"{_PATTERN[:-1]}{now:.6f}.{socket.gethostname()}"
        first = Event(wall_time=now, file_version="brain.Event:2")
        content = b"".join(map(_record, [first, *points.values()]))
        replace_file(self._path, lambda temporary: temporary.write_bytes(content))
        for path in earlier:
            path.unlink(missing_ok=True)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add points of one step, given by tag."""
        events = (Event(wall_time=time.time(), step=step, summary=scalar(*point)) for point in values.items())
        with errors_of(self._path), self._path.open("ab") as file:
            file.write(b"".join(map(_record, events)))


def _record(event: Event) -> bytes:
    """Return an event as a record: its length, its bytes and both checksums, little-endian."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _read(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to the first damaged one; an interrupted run may damage the last."""
    content = path.read_bytes() if path.is_file() else b""
    start = 0
    while len(content) >= start + 12:
        length, checksum = struct.unpack_from("<QI", content, start)
        data = content[start + 12 : start + 12 + length]
        if checksum != masked_crc32c(content[start : start + 8]) or len(data) != length:
            return
        try:
            yield Event.FromString(data)
        except DecodeError:
            return
        start += 12 + length + 4
