"""The kernels of `kernels.c`: building, trying out, and running them on ranges in several threads."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_OPTIONS = ("-O3", _NATIVE, "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 60  # for the compiler, which takes less than one
_BLOCK = 1024  # ranges are multiples of it; the block of the sum of squares
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class Step(ctypes.Structure):
    """Settings of a step; ``factor`` scales gradients, and ``threshold`` and ``slope`` make soft masks."""

    _fields_ = [  # ctypes reads it so
        (name, ctypes.c_float) for name in ("factor", "momentum", "weight_decay", "lr", "threshold", "slope")
    ]


_STEP = ctypes.POINTER(Step)
_ARGUMENTS: dict[str, list[Any]] = {
    "square": [_POINTER, _SIZE],
    "move": [_POINTER, _POINTER, _POINTER, _SIZE, _STEP],
    "move_softly": [_POINTER, _POINTER, _POINTER, _SIZE, _STEP, _POINTER, _POINTER],
    "sample": [_POINTER, _POINTER, _POINTER, _SIZE, _STEP, _SIZE, _POINTER],
}


def can_run(*tensors: Tensor) -> bool:
    """Return True if the kernels take tensors: contiguous, float32, on the CPU."""
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """Return the kernels as a library of `ctypes`; None where no compiler builds them."""
    try:
        built = _build()
        _try_out(built)
    except (OSError, subprocess.SubprocessError, ArithmeticError) as error:
        _logger.info("PyTorch moves the scores in several passes: no kernels for this CPU (%s)", error)
        return None
    return built


def _build() -> Any:
    """Compile for this very CPU, in a folder that is removed at once."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None or os.name != "posix":
        raise OSError("no C compiler")
    source = resources.files(__package__).joinpath("kernels.c").read_text()
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "kernels.so")
        command = [compiler, *_OPTIONS, "-x", "c", "-", "-o", library]
        subprocess.run(command, input=source.encode(), check=True, capture_output=True, timeout=_SECONDS)
        built = ctypes.CDLL(library)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, ctypes.c_double if name == "square" else None
    return built


def _try_out(built: Any) -> None:
    """Raise ArithmeticError if a step on a few numbers differs from PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    grad, momentum, score, weight = torch.randn(4, 1000, generator=generator)
    step = Step(2.0, 0.9, 0.05, 0.01, 0.2, 3.0)
    new_momentum = momentum * 0.9 + (grad * 2 + score * 0.05)
    new_score = score - 0.01 * new_momentum
    wanted = new_momentum, new_score, torch.sigmoid((new_score - 0.2) * 3) * weight
    masked = torch.empty_like(weight)
    built.move_softly(*_places(grad, momentum, score), 1000, step, *_places(weight, masked))
    if not all(map(torch.allclose, (momentum, score, masked), wanted)):
        raise ArithmeticError("the compiler's code computes something else")


def _places(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def address(tensor: Tensor, place: int) -> int:
    """Return the address of a number in a contiguous tensor."""
    return tensor.data_ptr() + place * tensor.element_size()


def in_parallel(sizes: Sequence[int], work: Callable[[int, int, int], float | None]) -> list[float]:
    """Run work on ranges of several tensors, by as many threads as PyTorch uses.

    Parameters
    ----------
    sizes
        Numbers of elements of the tensors.
    work
        Is called with the number of a tensor and the begin and end of a range in it. The calls overlap.

    Returns
    -------
    list of float
        Sums of what ``work`` has returned, one for each tensor.
    """
    threads = torch.get_num_threads()
    share = -(-sum(map(_blocks, sizes)) // threads)
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(threads)]
    used = 0
    for number, size in enumerate(sizes):
        begin = 0
        while begin < size:
            part, taken = divmod(used, share)
            end = min(size, begin + (share - taken) * _BLOCK)
            parts[part].append((number, begin, end))
            used += _blocks(end - begin)
            begin = end
    sums = [0.0] * len(sizes)
    for values in _map(lambda part: [(piece[0], work(*piece)) for piece in part], parts):
        for number, value in values:
            sums[number] += value or 0.0
    return sums


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _map(function: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    """Map with one thread for each part; the caller's thread takes the first."""
    parts = [part for part in parts if part] or [[]]
    others = [_pool(os.getpid(), len(parts)).submit(function, part) for part in parts[1:]]
    first = function(parts[0])
    return [first, *(other.result() for other in others)]


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked process needs new ones."""
    return ThreadPoolExecutor(threads, thread_name_prefix="nni-jackpot")
