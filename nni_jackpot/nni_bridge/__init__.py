"""The only wing that imports NNI: config lists, wrappers, evaluators, and patches for current PyTorch.

The patches (`compat`) are applied when NNI's compression or its tracer is imported. To import these takes
seconds, which a process that only reads a ticket or prints help does not wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The tracer is imported by the first or on its own.
_PATCHED = ("nni.compression", "nni.common.concrete_trace_utils")


def repair_nni() -> None:
    """Apply the patches now if NNI's compression is imported already, else as soon as it is."""
    if any(name in sys.modules for name in _PATCHED):
        _apply()
    elif not any(isinstance(finder, _Repairing) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Repairing())


def _apply() -> None:
    from nni_jackpot.nni_bridge import compat

    compat.apply()


class _Repairing(MetaPathFinder):
    """Finds the modules that the patches are for, and applies the patches after the import of the first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of NNI, whose loader then applies the patches; None for all others."""
        if name not in _PATCHED or any(other in sys.modules for other in _PATCHED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            _apply()

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec
