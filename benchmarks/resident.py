"""Resident memory of this process, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(run: Callable[[], Any]) -> float:
    """Return how many bytes the peak of the resident memory is above what there is before; nan if unknown."""
    if not _CLEAR.exists():
        run()
        return float("nan")
    reset_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def reset_peak() -> None:
    """Reset ``VmHWM`` to the resident memory of now; raises OSError where Linux does not allow it."""
    _CLEAR.write_text("5", encoding="utf-8")


def give_back() -> None:
    """Give freed memory back to the system, or what is taken next would be taken from it unseen."""
    gc.collect(0)
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def resident(key: str) -> int:
    """Return bytes by a key of the status, ``VmRSS`` or ``VmHWM``."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


_LIBC = ctypes.CDLL(None)
