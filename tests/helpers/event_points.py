"""Points of TensorBoard's files; not a test."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event


def read_events(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Return (step, value) by tag; a record is its length, a checksum, the event and a checksum."""
    result: dict[str, list[tuple[int, Any]]] = {}
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                result.setdefault(value.tag, []).append((event.step, pytest.approx(value.simple_value)))
            data = data[16 + length :]
    return result
