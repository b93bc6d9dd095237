"""Patches for the classes that NNI's tracer replaces: ``list``, ``int``, ``torch.Size`` and others.

While NNI traces a model, ``builtins.list`` is a callable object instead of a class, and all code that runs
during the trace sees it: the model, PyTorch, imported modules. Newer PyTorch and models use the class itself:
``list[int]``, ``int | None``.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx._symbolic_trace import _Patcher

from .tracer import _tracer
from .wrapping import wraps_once


class ClassPatcher(_Patcher):
    """torch.fx's patcher, with replacements that behave like the replaced class and can be suspended."""

    def __init__(self) -> None:
        super().__init__()
        self._replaced: list[tuple[Any, str, Any]] = []

    def patch_method(self, cls: Any, name: str, new_fn: Any, deduplicate: bool = True) -> None:
        """Replace an attribute as torch.fx does, and record the replacements that leaves must not see."""
        original = getattr(cls, name)
        if isinstance(original, type):
            _answer_as(original, type(new_fn))
        if cls is builtins or isinstance(original, type):
            self._replaced.append((cls, name, original))
        super().patch_method(cls, name, new_fn, deduplicate)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Restore the builtins and the classes for the block."""
        replacements = [(place, name, vars(place)[name]) for place, name, _ in self._replaced]
        for place, name, original in self._replaced:
            setattr(place, name, original)
        try:
            yield
        finally:
            for place, name, replacement in replacements:
                setattr(place, name, replacement)


def let_replacements_answer_as_the_class() -> None:
    """concrete_tracer.py:1064-1071 replaces builtin classes by objects that only support calls.

    "'clz_wrapper_clz' object is not subscriptable" or "unsupported operand type(s) for |" wherever PyTorch or
    a model evaluates ``list[int]`` or ``int | None``: in ``F.max_pool2d(x, 2)``, whose stride is a
    ``list[int]``, in ``typing.cast``, in ``isinstance(x, list | tuple)``, in annotations of functions defined
    during the trace.
    """
    _tracer()._Patcher = ClassPatcher


def run_leaves_without_replacements() -> None:
    """concrete_tracer.py:364-367 runs PyTorch's leaf functions with builtins replaced.

    Newer PyTorch compares types in them, ``type(x) is bool``, which is false for a replacement: "Expected
    bool, got True" in ``F.max_unpool2d``.
    """

    @wraps_once(_tracer().ConcreteTracer, "run_target")
    def run_lifted(run_target: Any, self: Any, kind: str, *args: Any) -> Any:
        if kind == "placeholder":  # runs before anything is replaced
            return run_target(self, kind, *args)
        with self.patcher.lifted():
            return run_target(self, kind, *args)


def import_without_replacements() -> None:
    """concrete_tracer.py:1083 runs the model, and the modules it imports, with builtins replaced.

    Newer PyTorch imports many of its modules on first use. Defining their classes fails, and their tensors
    would become part of the graph.
    """

    @wraps_once(_tracer().OperatorPatcherContext, "__enter__")
    def enter_with_imports_lifted(enter: Any, self: Any) -> None:
        enter(self)
        for place, name in ((builtins, "__import__"), (importlib, "import_module")):
            self.tracer.patcher.patch_method(place, name, _lifted(getattr(place, name), self.tracer))


def _lifted(function: Callable[..., Any], tracer: Any) -> Callable[..., Any]:
    def call_lifted(*args: Any, **kwargs: Any) -> Any:
        with tracer.do_temp_disable(True, True, True), tracer.patcher.lifted():
            return function(*args, **kwargs)

    return call_lifted


def _answer_as(original: Any, replacement: Any) -> None:
    """Give the class of a replacement the special methods of a class other than the call."""
    replacement.__getattr__ = lambda _, name: getattr(original, name)
    replacement.__getitem__ = lambda _, item: original[item]
    replacement.__or__ = lambda _, other: original | other
    replacement.__ror__ = lambda _, other: other | original
    replacement.__instancecheck__ = lambda _, instance: isinstance(instance, original)
    replacement.__subclasscheck__ = lambda _, subclass: issubclass(subclass, original)
    replacement.__mro_entries__ = lambda _, bases: (original,)
