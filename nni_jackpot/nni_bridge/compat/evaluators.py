"""Patches of NNI's evaluators for Lightning 2 and Transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from .wrapping import wraps_once

Tasks = list[Callable[[], Any]]


def set_max_steps_of_lightning() -> None:
    """nni/compression/utils/evaluator.py:633 assigns ``trainer.fit_loop.max_steps``.

    In Lightning 2 the property has no setter: "property 'max_steps' of '_FitLoop' object has no setter". The
    patch adds the setter of Lightning 1.
    """
    evaluator = _evaluator()
    loop = getattr(evaluator.pl.loops.fit_loop, "_FitLoop", None) if evaluator.LIGHTNING_INSTALLED else None
    if loop is None or loop.max_steps.fset is not None:
        return

    def set_max_steps(self: Any, max_steps: int) -> None:
        self.epoch_loop.max_steps = max_steps

    loop.max_steps = loop.max_steps.setter(set_max_steps)


def trace_default_optimizer_of_transformers() -> None:
    """nni/compression/utils/evaluator.py:993-999 patches ``Trainer.get_optimizer_cls_and_kwargs``.

    The replacement takes one argument, but Transformers passes three: TypeError, and the static method is
    restored as a plain function. The patch gives the traced class to the trainer directly.
    """
    evaluator = _evaluator()
    if not evaluator.TRANSFORMERS_INSTALLED:
        return
    trainer_class = evaluator.HFTrainer
    static_method = vars(trainer_class)["get_optimizer_cls_and_kwargs"]

    @wraps_once(evaluator.TransformersEvaluator, "_init_optimizer_helpers")
    def with_traced_class(init: Any, self: Any, pure_model: torch.nn.Module) -> None:
        trainer = self.traced_trainer
        given = trainer.optimizer_cls_and_kwargs
        optimizer_class, kwargs = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer_cls_and_kwargs = evaluator.nni.trace(optimizer_class), kwargs
        try:
            init(self, pure_model)
        finally:
            trainer.optimizer_cls_and_kwargs = given
            trainer_class.get_optimizer_cls_and_kwargs = static_method


def patch_loss_of_any_signature() -> None:
    """nni/compression/utils/evaluator.py:1064 replaces ``Trainer.compute_loss`` by one of three arguments.

    Transformers also passes ``num_items_in_batch``: "got an unexpected keyword argument".
    """

    @wraps_once(_evaluator().TransformersEvaluator, "patch_loss")
    def patch_loss_with_all_arguments(
        _: Any, self: Any, patch: Callable[[torch.Tensor, Any], torch.Tensor]
    ) -> None:
        compute_loss = self.trainer.compute_loss

        def patched(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = compute_loss(model, inputs, return_outputs, **kwargs)
            return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

        self.trainer.compute_loss = patched


def patch_step_of_transformers() -> None:
    """nni/compression/utils/evaluator.py:1077-1097 patches the optimizer's step as training begins.

    It takes any trainer with an attribute ``deepspeed`` for one that uses DeepSpeed, and newer Transformers
    always has the attribute: "assert optimizer is not None". Also, each patch undoes the previous one
    (``MovementPruner`` needs two). Without DeepSpeed the optimizer already exists, so its own step can be
    patched. A gradient scaler calls this step too, after unscaling the gradients.
    """
    evaluator_class = _evaluator().TransformersEvaluator

    def unwrap_optimizer(self: Any) -> Any:
        # Training leaves Accelerate's wrapper around the optimizer, which keeps calling the old step.
        self.trainer.optimizer = self._ori_trainer_attr["optimizer.step"].__self__
        return self.trainer.optimizer

    @wraps_once(evaluator_class, "patch_optimizer_step")
    def patch_own_step(patch_step: Any, self: Any, before_step_tasks: Tasks, after_step_tasks: Tasks) -> None:
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

        # PyTorch's schedulers require a bound method.
        optimizer.step = MethodType(patched, optimizer)

    @wraps_once(evaluator_class, "revert_optimizer_step")
    def revert_own_step(revert_step: Any, self: Any) -> None:
        unwrap_optimizer(self)
        revert_step(self)


def add_parameters_beside_those_of_the_model() -> None:
    """nni/compression/utils/evaluator.py:195 looks up the submodule of every parameter in an optimizer.

    A parameter of the model itself (a class token) is in no submodule: "list index out of range". The patch
    makes the model the only child of another module.
    """

    @wraps_once(_evaluator().Evaluator, "_optimizer_add_param_group")
    def add_with_parent(
        add: Any, self: Any, model: torch.nn.Module, parameters: dict[str, Any], optimizers: Any
    ) -> None:
        parent = torch.nn.Module()
        parent.add_module("model", model)
        add(self, parent, {f"model.{name}": added for name, added in parameters.items()}, optimizers)


def _evaluator() -> Any:
    from nni.compression.utils import evaluator

    return evaluator
