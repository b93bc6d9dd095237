"""What NNI 3.0 needs to run on today's PyTorch and Python; applied when nni_jackpot is imported.

NNI is archived, and its pruning quick start (a pruner, then ``ModelSpeedup``) fails on PyTorch 2 (upstream
issue 5768). Each repair below mends one cause from outside, is a no-op where NNI or PyTorch does not need it,
and changes nothing where NNI works already.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree

_applied = False


def apply() -> None:
    """Apply all repairs, once a process."""
    global _applied
    if not _applied:
        _applied = True
        for repair in REPAIRS:
            repair()


def import_without_registering_twice() -> None:
    """nni/compression/speedup/utils.py:32-33 registers fx's immutable containers as pytree nodes.

    PyTorch has registered them itself since 2.1 and prints two warnings for each. NNI's registration differs
    in nothing, so it is skipped while the module is imported.
    """
    register = getattr(_pytree, "_register_pytree_node", None)
    if register is None or "nni.compression.speedup.utils" in sys.modules:
        return

    def register_once(cls: type, *args: Any, **kwargs: Any) -> None:
        if cls not in _pytree.SUPPORTED_NODES:
            register(cls, *args, **kwargs)

    _pytree._register_pytree_node = register_once
    try:
        import nni.compression.speedup.utils  # noqa: F401
    finally:
        _pytree._register_pytree_node = register


def skip_builtins_without_module() -> None:
    """concrete_tracer.py:204-238 wraps every builtin of torch, by ``func.__module__``.

    Newer PyTorch has builtins whose ``__module__`` is None (``unique_dim``, ``_make_subclass``), for which
    torch.fx raises "'NoneType' object has no attribute 'startswith'" (issue 5768).
    """
    wrapped = _tracer().ConcreteTracer.default_autowrap_leaf_function
    for function in [f for f in wrapped if getattr(f, "__module__", "") is None]:
        del wrapped[function]


def accept_new_is_impure_signature() -> None:
    """concrete_tracer.py:1436 replaces ``torch.fx.Node.is_impure`` by a function of one argument.

    Newer torch.fx calls it with ``impure_random`` as well: TypeError.
    """
    module = _tracer()
    one_argument = module.node_is_impure_wrapper
    # The function's own signature: by functools.wraps it shows that of the method it replaces.
    takes = len(inspect.signature(one_argument, follow_wrapped=False).parameters)
    if takes >= len(inspect.signature(torch.fx.Node.is_impure).parameters):
        return

    @functools.wraps(one_argument)
    def node_is_impure(node: torch.fx.Node, *args: Any, **kwargs: Any) -> bool:
        return one_argument(node)

    module.node_is_impure_wrapper = node_is_impure


def index_instructions_by_offset() -> None:
    """concrete_proxy.py:90, 129, 160 and 198 look up the instruction of a frame at ``f_lasti // 2``.

    Since Python 3.11 ``dis.get_instructions`` leaves out the CACHE entries that ``f_lasti`` counts: the wrong
    instruction is looked at, or IndexError raised.
    """
    probe = list(dis.get_instructions(index_instructions_by_offset))
    if _proxy().dis is not dis or all(instruction.offset == 2 * i for i, instruction in enumerate(probe)):
        return

    def get_instructions(code: CodeType) -> Iterator[dis.Instruction]:
        # A cache entry stands for the instruction after it, since NNI takes ``index + 1`` for the next one.
        offset = 0
        for instruction in dis.get_instructions(code):
            while offset <= instruction.offset:
                yield instruction
                offset += 2

    _proxy().dis = SimpleNamespace(get_instructions=get_instructions, opmap=dis.opmap)


def know_new_jumps() -> None:
    """concrete_proxy.py:44-52 lists the opcodes of branches, by which ``__bool__`` knows to return a bool.

    Python 3.11 renamed them (``POP_JUMP_FORWARD_IF_FALSE``) and 3.13 tests in an instruction before the jump
    (``TO_BOOL``): "__bool__ should return bool" (efficientnet, inception).
    """
    proxy = _proxy().ConcreteProxy
    jumps = tuple(code for name, code in dis.opmap.items() if name.startswith("POP_JUMP_"))
    proxy.jump_opcodes = tuple(dict.fromkeys((*proxy.jump_opcodes, *jumps)))
    before = tuple(code for name, code in dis.opmap.items() if name == "TO_BOOL")
    proxy.jump_before_opcodes = tuple(dict.fromkeys((*proxy.jump_before_opcodes, *before)))


def _tracer() -> Any:
    from nni.common.concrete_trace_utils import concrete_tracer

    return concrete_tracer


def _proxy() -> Any:
    from nni.common.concrete_trace_utils import concrete_proxy

    return concrete_proxy


REPAIRS: tuple[Callable[[], None], ...] = (
    import_without_registering_twice,
    skip_builtins_without_module,
    accept_new_is_impure_signature,
    index_instructions_by_offset,
    know_new_jumps,
)
