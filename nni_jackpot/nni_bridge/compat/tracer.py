"""Patches of NNI's concrete tracer for changes in PyTorch and Python."""

from __future__ import annotations
import __future__

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, MethodDescriptorType, MethodWrapperType, SimpleNamespace
from typing import Any

import torch

from .wrapping import wraps_once


def wrap_types_without_their_parameters() -> None:
    """concrete_tracer.py:889 applies ``functools.wraps(type)`` to a function.

    Since Python 3.12 this also copies ``__type_params__``, but the attribute of ``type`` itself is not a
    tuple: TypeError "__type_params__ must be set to a tuple".
    """
    if "__type_params__" not in functools.WRAPPER_ASSIGNMENTS or _tracer().functools is not functools:
        return
    assigned = tuple(name for name in functools.WRAPPER_ASSIGNMENTS if name != "__type_params__")
    wraps = functools.partial(functools.wraps, assigned=assigned)
    _tracer().functools = SimpleNamespace(**{**vars(functools), "wraps": wraps})


def skip_builtins_without_module() -> None:
    """concrete_tracer.py:204-238 wraps every builtin of torch, by ``func.__module__``.

    Newer PyTorch has builtins whose ``__module__`` is None (``unique_dim``, ``_make_subclass``), for which
    torch.fx raises "'NoneType' object has no attribute 'startswith'" (issue 5768).
    """
    wrapped = _tracer().ConcreteTracer.default_autowrap_leaf_function

    def module_is_looked_up(function: Any) -> bool:
        # NNI locates these by qualified name or type and does not need the module.
        return not (
            function.__qualname__.startswith(("_TensorBase", "_VariableFunctionsClass"))
            or isinstance(function, (MethodDescriptorType, MethodWrapperType))
        )

    for function in [f for f in wrapped if getattr(f, "__module__", "") is None and module_is_looked_up(f)]:
        del wrapped[function]


def accept_new_is_impure_signature() -> None:
    """concrete_tracer.py:1436 replaces ``torch.fx.Node.is_impure`` by a function of one argument.

    Newer torch.fx also passes ``impure_random``: TypeError.
    """
    module = _tracer()
    one_argument = module.node_is_impure_wrapper
    # The function's own signature; functools.wraps makes it show the signature of the replaced method.
    takes = len(inspect.signature(one_argument, follow_wrapped=False).parameters)
    if takes >= len(inspect.signature(torch.fx.Node.is_impure).parameters):
        return

    @functools.wraps(one_argument)
    def node_is_impure(node: torch.fx.Node, *args: Any, **kwargs: Any) -> bool:
        return one_argument(node)

    module.node_is_impure_wrapper = node_is_impure


def index_instructions_by_offset() -> None:
    """concrete_proxy.py:90, 129, 160 and 198 look up the instruction of a frame at ``f_lasti // 2``.

    Since Python 3.11 ``dis.get_instructions`` leaves out the CACHE entries that ``f_lasti`` counts: NNI reads
    the wrong instruction, or raises IndexError.
    """
    probe = list(dis.get_instructions(index_instructions_by_offset))
    if _proxy().dis is not dis or all(instruction.offset == 2 * i for i, instruction in enumerate(probe)):
        return

    def get_instructions(code: CodeType) -> Iterator[dis.Instruction]:
        # Yield the following instruction for a cache entry, since NNI reads the next one at ``index + 1``.
        offset = 0
        for instruction in dis.get_instructions(code):
            while offset <= instruction.offset:
                yield instruction
                offset += 2

    _proxy().dis = SimpleNamespace(get_instructions=get_instructions, opmap=dis.opmap)


def know_new_jumps() -> None:
    """concrete_proxy.py:44-52 lists the branch opcodes for which ``__bool__`` returns a bool.

    Python 3.11 renamed them (``POP_JUMP_FORWARD_IF_FALSE``), and 3.13 calls ``__bool__`` in an instruction
    before the jump (``TO_BOOL``): "__bool__ should return bool" (efficientnet, inception).
    """
    proxy = _proxy().ConcreteProxy
    jumps = [code for name, code in dis.opmap.items() if name.startswith("POP_JUMP_")]
    before = []
    if "TO_BOOL" in dis.opmap:
        before.append(dis.opmap["TO_BOOL"])
        # ``not`` no longer calls ``__bool__`` itself: the TO_BOOL in front of it does.
        jumps.append(dis.opmap["UNARY_NOT"])
    proxy.jump_opcodes = tuple(dict.fromkeys((*proxy.jump_opcodes, *jumps)))
    proxy.jump_before_opcodes = tuple(dict.fromkeys((*proxy.jump_before_opcodes, *before)))


def call_functions_as_documented() -> None:
    """concrete_tracer.py:1297 calls the C function of ``torch.norm`` and others, not the Python function.

    The documented function is a Python function with another signature, which PyTorch's own code calls:
    "norm() received an invalid combination of arguments" in ``F.normalize``, "broadcast_tensors() takes 1
    positional argument but 2 were given" in ``F.mse_loss``.
    """

    @wraps_once(_tracer(), "_create_wrapped_leaf_func")
    def create_of_python_function(
        create: Any, tracer: Any, function: Any, to_func: Any, *init_tracers: Any
    ) -> Any:
        return create(tracer, to_func or function, to_func, *init_tracers)


def leave_annotations_unread() -> None:
    """operator_patcher.py:248-259 recompiles a function on its own, which evaluates its annotations.

    The function's module may use ``from __future__ import annotations``: NameError if an annotation has a
    name that exists for type checkers only.
    """
    from nni.common.concrete_trace_utils import operator_patcher

    if "compile" not in vars(operator_patcher):
        operator_patcher.compile = functools.partial(compile, flags=__future__.annotations.compiler_flag)


def _tracer() -> Any:
    from nni.common.concrete_trace_utils import concrete_tracer

    return concrete_tracer


def _proxy() -> Any:
    from nni.common.concrete_trace_utils import concrete_proxy

    return concrete_proxy
