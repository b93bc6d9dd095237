"""Resident memory of this process, as reported by Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(run: Callable[[], Any]) -> float:
    """Return the peak of resident memory during a run minus the memory before, in bytes; NaN if unknown."""
    if not _CLEAR.exists():
        run()
        return float("nan")
    reset_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def reset_peak() -> None:
    """Reset ``VmHWM`` to the current resident memory; raises OSError if Linux does not allow it."""
    _CLEAR.write_text("5", encoding="utf-8")


def give_back() -> None:
    """Return freed memory to the system, as allocations from it would not be measured."""
    gc.collect(0)
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def resident(key: str) -> int:
    """Return the bytes of a status key, ``VmRSS`` or ``VmHWM``."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


_LIBC = ctypes.CDLL(None)
