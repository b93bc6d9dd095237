"""What NNI 3.0 needs to run on today's PyTorch and Python; applied when nni_jackpot is imported.

NNI is archived, and its pruning quick start (a pruner, then ``ModelSpeedup``) fails on PyTorch 2 (upstream
issue 5768), its evaluators on Lightning 2 and Transformers 5. Each repair below mends one cause from outside,
is a no-op where NNI or what it builds on does not need it, and changes nothing where NNI works already.
"""

from __future__ import annotations

import dis
import functools
import inspect
import io
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType, MethodDescriptorType, MethodType, MethodWrapperType, SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree

Tasks = list[Callable[[], Any]]
_applied = False


def apply() -> None:
    """Apply all repairs, once a process."""
    global _applied
    if not _applied:
        for repair in REPAIRS:
            repair()
        _applied = True


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


def wrap_types_without_their_parameters() -> None:
    """concrete_tracer.py:889 gives a function the looks of ``type``, by ``functools.wraps``.

    Since Python 3.12 that copies ``__type_params__`` as well, which those of ``type`` itself cannot be:
    TypeError "__type_params__ must be set to a tuple".
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
        # NNI finds the place of these by their qualified name or type, so a missing module does no harm.
        return not (
            function.__qualname__.startswith(("_TensorBase", "_VariableFunctionsClass"))
            or isinstance(function, (MethodDescriptorType, MethodWrapperType))
        )

    for function in [f for f in wrapped if getattr(f, "__module__", "") is None and module_is_looked_up(f)]:
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
    jumps = [code for name, code in dis.opmap.items() if name.startswith("POP_JUMP_")]
    before = []
    if "TO_BOOL" in dis.opmap:
        before.append(dis.opmap["TO_BOOL"])
        # ``not`` no longer calls ``__bool__`` itself: the TO_BOOL in front of it does.
        jumps.append(dis.opmap["UNARY_NOT"])
    proxy.jump_opcodes = tuple(dict.fromkeys((*proxy.jump_opcodes, *jumps)))
    proxy.jump_before_opcodes = tuple(dict.fromkeys((*proxy.jump_before_opcodes, *before)))


def keep_sizes_whole() -> None:
    """nni/compression/speedup/utils.py:90-103, ``tree_map_zip``, takes a ``torch.Size`` for a leaf.

    Newer PyTorch has it registered as a pytree node that is rebuilt as a tuple: ``x.shape[1:].numel()`` fails
    in the speedup with "'tuple' object has no attribute 'numel'".
    """
    from nni.compression.speedup import utils

    if utils.tree_map is not _pytree.tree_map or torch.Size not in _pytree.SUPPORTED_NODES:
        return

    def is_size(node: Any) -> bool:
        return isinstance(node, torch.Size)

    # tree_map_zip is imported by value in several modules, but looks these up in its own.
    utils.tree_map = functools.partial(_pytree.tree_map, is_leaf=is_size)
    utils.tree_flatten = functools.partial(_pytree.tree_flatten, is_leaf=is_size)


def free_randomized_values() -> None:
    """nni/compression/speedup/mask_updater.py:261 deletes ``_output_randomize``, misspelt, of a node's info.

    AttributeError wherever ``len(x)``, ``x.dim()`` or ``x.size()`` is the last use of a value.
    """
    from nni.compression.speedup.container import NodeInfo

    if hasattr(NodeInfo, "_output_randomize"):
        return

    def delete(info: Any) -> None:
        del info.output_randomize

    NodeInfo._output_randomize = property(fdel=delete)


def load_masks_files() -> None:
    """nni/compression/speedup/model_speedup.py:136 loads a masks file by ``torch.load``.

    The masks that a pruner returns are a ``defaultdict``, which PyTorch since 2.6 refuses to load: "Weights
    only load failed". It is read as a plain dict here, so that a masks file still can't run any code.
    """
    from nni.compression.speedup import ModelSpeedup

    init = ModelSpeedup.__init__
    if hasattr(init, "__wrapped__") or _loads_defaultdict():
        return
    allowed: list[Any] = [(_plain_dict, "collections.defaultdict"), (dict, "builtins.dict")]

    @functools.wraps(init)
    def with_defaultdict(*args: Any, **kwargs: Any) -> None:
        with torch.serialization.safe_globals(allowed):
            init(*args, **kwargs)

    ModelSpeedup.__init__ = with_defaultdict


def set_max_steps_of_lightning() -> None:
    """nni/compression/utils/evaluator.py:633 assigns ``trainer.fit_loop.max_steps``.

    Lightning 2 gives the property no setter: "property 'max_steps' of '_FitLoop' object has no setter". It
    gets back that of Lightning 1.
    """
    evaluator = _evaluator()
    loop = getattr(evaluator.pl.loops.fit_loop, "_FitLoop", None) if evaluator.LIGHTNING_INSTALLED else None
    if loop is None or loop.max_steps.fset is not None:
        return

    def set_max_steps(self: Any, max_steps: int) -> None:
        self.epoch_loop.max_steps = max_steps

    loop.max_steps = loop.max_steps.setter(set_max_steps)


def trace_default_optimizer_of_transformers() -> None:
    """nni/compression/utils/evaluator.py:993-999 replaces ``Trainer.get_optimizer_cls_and_kwargs`` meanwhile.

    Its replacement takes one argument where Transformers passes three: TypeError, and a plain function stays
    where a static method was. The trainer is given the traced class instead, so that it asks for none.
    """
    evaluator = _evaluator()
    init = evaluator.TransformersEvaluator._init_optimizer_helpers
    if not evaluator.TRANSFORMERS_INSTALLED or hasattr(init, "__wrapped__"):
        return
    trainer_class = evaluator.HFTrainer
    static_method = vars(trainer_class)["get_optimizer_cls_and_kwargs"]
    if len(inspect.signature(static_method).parameters) == 1:
        return

    @functools.wraps(init)
    def with_traced_class(self: Any, pure_model: torch.nn.Module) -> None:
        trainer = self.traced_trainer
        given = trainer.optimizer_cls_and_kwargs
        optimizer_class, kwargs = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer_cls_and_kwargs = evaluator.nni.trace(optimizer_class), kwargs
        try:
            init(self, pure_model)
        finally:
            trainer.optimizer_cls_and_kwargs = given
            trainer_class.get_optimizer_cls_and_kwargs = static_method

    evaluator.TransformersEvaluator._init_optimizer_helpers = with_traced_class


def patch_loss_of_any_signature() -> None:
    """nni/compression/utils/evaluator.py:1064 replaces ``Trainer.compute_loss`` by one of three arguments.

    Transformers passes ``num_items_in_batch`` as well: "got an unexpected keyword argument".
    """
    evaluator = _evaluator()
    patch_loss = evaluator.TransformersEvaluator.patch_loss
    if not evaluator.TRANSFORMERS_INSTALLED or hasattr(patch_loss, "__wrapped__"):
        return
    if len(inspect.signature(evaluator.HFTrainer.compute_loss).parameters) == 4:
        return

    @functools.wraps(patch_loss)
    def patch_loss_with_all_arguments(self: Any, patch: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        compute_loss = self.trainer.compute_loss

        def patched(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = compute_loss(model, inputs, return_outputs, **kwargs)
            return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

        self.trainer.compute_loss = patched

    evaluator.TransformersEvaluator.patch_loss = patch_loss_with_all_arguments


def patch_step_of_transformers() -> None:
    """nni/compression/utils/evaluator.py:1077-1097 patches the optimizer's step as training begins.

    It takes every trainer that has an attribute ``deepspeed`` for one that uses it, and newer Transformers
    always has it: "assert optimizer is not None". Besides, each patch undoes the one before
    (``MovementPruner`` needs two). Without DeepSpeed the optimizer is there already, and its own step can be
    patched, which also is what a gradient scaler calls once it has unscaled the gradients.
    """
    evaluator = _evaluator()
    transformers_evaluator = evaluator.TransformersEvaluator
    patch_step = transformers_evaluator.patch_optimizer_step
    if not evaluator.TRANSFORMERS_INSTALLED or hasattr(patch_step, "__wrapped__"):
        return
    revert_step = transformers_evaluator.revert_optimizer_step

    def unwrap_optimizer(self: Any) -> Any:
        # Training leaves Accelerate's wrapper of the optimizer, which would call the step it has met.
        self.trainer.optimizer = self._ori_trainer_attr["optimizer.step"].__self__
        return self.trainer.optimizer

    @functools.wraps(patch_step)
    def patch_own_step(self: Any, before_step_tasks: Tasks, after_step_tasks: Tasks) -> None:
        if self.trainer.args.deepspeed:
            patch_step(self, before_step_tasks, after_step_tasks)
            return
        optimizer = unwrap_optimizer(self)
        step = optimizer.step

        def patched(_: Any, *args: Any, **kwargs: Any) -> Any:
            for task in before_step_tasks:
                task()
            output = step(*args, **kwargs)
            for task in after_step_tasks:
                task()
            return output

        # A scheduler of PyTorch asks for a method.
        optimizer.step = MethodType(patched, optimizer)

    @functools.wraps(revert_step)
    def revert_own_step(self: Any) -> None:
        unwrap_optimizer(self)
        revert_step(self)

    transformers_evaluator.patch_optimizer_step = patch_own_step
    transformers_evaluator.revert_optimizer_step = revert_own_step


def add_parameters_beside_those_of_the_model() -> None:
    """nni/compression/utils/evaluator.py:195 looks for the module of every parameter in an optimizer.

    A parameter of the model itself (a class token) is in none: "list index out of range". Here the model is
    the only child of another, so that every parameter is in a module.
    """
    evaluator = _evaluator().Evaluator
    add = evaluator._optimizer_add_param_group
    if hasattr(add, "__wrapped__"):
        return

    @functools.wraps(add)
    def add_with_parent(
        self: Any, model: torch.nn.Module, parameters: dict[str, Any], optimizers: Any
    ) -> None:
        parent = torch.nn.Module()
        parent.add_module("model", model)
        add(self, parent, {f"model.{name}": added for name, added in parameters.items()}, optimizers)

    evaluator._optimizer_add_param_group = add_with_parent


def _loads_defaultdict() -> bool:
    file = io.BytesIO()
    torch.save(defaultdict(dict, {"module": {}}), file)
    file.seek(0)
    try:
        torch.load(file)
    except pickle.UnpicklingError:
        return False
    return True


def _plain_dict(default_factory: Any = None) -> dict[Any, Any]:
    return {}


def _tracer() -> Any:
    from nni.common.concrete_trace_utils import concrete_tracer

    return concrete_tracer


def _proxy() -> Any:
    from nni.common.concrete_trace_utils import concrete_proxy

    return concrete_proxy


def _evaluator() -> Any:
    from nni.compression.utils import evaluator

    return evaluator


REPAIRS: tuple[Callable[[], None], ...] = (
    import_without_registering_twice,
    wrap_types_without_their_parameters,
    skip_builtins_without_module,
    accept_new_is_impure_signature,
    index_instructions_by_offset,
    know_new_jumps,
    keep_sizes_whole,
    free_randomized_values,
    load_masks_files,
    set_max_steps_of_lightning,
    trace_default_optimizer_of_transformers,
    patch_loss_of_any_signature,
    patch_step_of_transformers,
    add_parameters_beside_those_of_the_model,
)
