"""The command ``nni-jackpot doctor``: versions, hardware, repairs of NNI, and missing libraries."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

import nni_jackpot
from nni_jackpot.nni_bridge.compat import PATCHES
from nni_jackpot.runtime.extras import EXTRAS, install_command

_LIBRARIES = "torch", "torchvision", "nni", "numpy", "safetensors", "transformers", "timm"


def doctor(options: argparse.Namespace) -> None:
    """Print versions, hardware, repairs of NNI, and how to install what is missing."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    print(f"nni-jackpot {nni_jackpot.__version__}, {system}")
    print(", ".join(f"{name} {_version(name)}" for name in _LIBRARIES))
    for line in (*_hardware(), *_repairs(), *_extras()):
        print(line)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _hardware() -> Iterator[str]:
    yield f"CPU: {os.cpu_count()} processors, of which PyTorch uses {torch.get_num_threads()}"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        kernels = "2:4 kernels" if (found.major, found.minor) >= (8, 0) else "no 2:4 kernels"
        gib = found.total_memory / 2**30
        yield f"GPU {number}: {found.name}, {gib:.0f} GiB, capability {found.major}.{found.minor}, {kernels}"
    if not torch.cuda.is_available():
        yield f"GPU: none that this PyTorch, built for {_built_for()}, can use"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    triton = "installed" if find_spec("triton") else "not installed"
    yield f"C compiler: {compiler or 'none'}; Triton: {triton}. Both make searches faster"


def _built_for() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no GPU"


def _repairs() -> Iterator[str]:
    yield f"repairs of NNI: {len(PATCHES)}, each in effect where this NNI, PyTorch or Python needs it:"
    for patch in PATCHES:
        yield f"  {patch.__name__.replace('_', ' ')}"


def _extras() -> Iterator[str]:
    for extra, modules in EXTRAS.items():
        if missing := [name for name in modules if find_spec(name) is None]:
            yield f"{extra}: without {', '.join(missing)}: {install_command(extra)}"
        else:
            yield f"{extra}: complete"
