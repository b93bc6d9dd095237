"""The parameters of a model: their names, the modules that hold them, and whether they can be masked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nni_jackpot.errors import (
    ConfigListError,
    TargetWithoutParametersError,
    WeightDtypeError,
    WeightValueError,
)

# For the id of each parameter, the modules that hold it and its names there.
Holders = Mapping[int, list[tuple[nn.Module, str]]]

# Attributes of modules that torch's functions make compute their weight before every forward, and the remedy.
_COMPUTED_WEIGHTS = {
    "{}_g": "torch.nn.utils.remove_weight_norm(module), or use torch.nn.utils.parametrizations.weight_norm",
    "{}_u": "torch.nn.utils.remove_spectral_norm(module), or use "
    "torch.nn.utils.parametrizations.spectral_norm",
    "{}_mask": "torch.nn.utils.prune.remove(module, {!r})",
}
_HELD_BY_MODULES = ("_parameters", "_buffers", "_modules")


def join(module: str, name: str) -> str:
    """Return the full name of a module's tensor; the root module has the empty name."""
    return f"{module}.{name}" if module else name


def first_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the first name of every module of a model; a shared module has several names."""
    return {module: name for name, module in model.named_modules()}


def holders_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, for the id of each parameter, the modules that hold it and its names there."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].append((module, name))
    return dict(holders)


def names_of_all(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name, a tied parameter under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def parametrized(model: nn.Module) -> dict[str, Tensor]:
    """Return the values of all parametrized tensors, by name."""
    with steady_parametrizations(model):
        return {
            join(prefix, name): getattr(module, name)
            for prefix, module in model.named_modules()
            if parametrize.is_parametrized(module)
            for name in module.parametrizations
        }


def remove_parametrizations(model: nn.Module, names: Iterable[str]) -> None:
    """Replace parametrized tensors by plain parameters with the same values."""
    for name in names:
        prefix, _, target = name.rpartition(".")
        module = model.get_submodule(prefix)
        if parametrize.is_parametrized(module, target):
            originals: Any = module.parametrizations
            takes_gradient = any(p.requires_grad for p in originals[target].parameters())
            # PyTorch deletes the attribute from the class, which copies of the module share: copy the class.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            with steady_parametrizations(module):
                parametrize.remove_parametrizations(module, target, leave_parametrized=True)
            value = getattr(module, target).detach()
            module._buffers.pop(target, None)  # PyTorch makes it a buffer if gradients are off
            module.register_parameter(target, nn.Parameter(value, requires_grad=takes_gradient))


@contextmanager
def steady_parametrizations(model: nn.Module) -> Iterator[None]:
    """Put parametrizations into eval mode, so that reading a weight does not change them.

    In train mode a spectral norm updates its estimate on each read of the weight.
    """
    parts = [
        (part, part.training)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for part in module.parametrizations.modules()  # type: ignore[union-attr]
    ]
    for part, _ in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in parts:
            part.training = training


def check_initialized(name: str, module: nn.Module) -> None:
    """Raise WeightDtypeError if a parameter of a module is lazy and has no shape yet."""
    for target, parameter in module._parameters.items():
        if parameter is not None and is_lazy(parameter):
            raise WeightDtypeError(f"{name}.{target} has no shape yet: run one forward of the model first")


def check_maskable(where: str, module: nn.Module, name: str) -> None:
    """Refuse a tensor that cannot be masked, or that is also read without its mask.

    Parameters
    ----------
    where
        The tensor's name in the model, for messages.
    module, name
        The module that holds the tensor, and the tensor's name there.

    Raises
    ------
    TargetWithoutParametersError
        If the tensor is neither a parameter of the module nor parametrized.
    WeightDtypeError
        If the tensor has no values, or a dtype without arithmetic.
    WeightValueError
        If the tensor contains NaN or infinite values.
    ConfigListError
        If the module is an embedding with sparse gradients or ``max_norm``.
    """
    if name not in module._parameters and not parametrize.is_parametrized(module, name):
        raise TargetWithoutParametersError(f"{where} is not a parameter but {_what_else(module, name)}")
    value: Tensor = getattr(module, name)
    if value.is_meta:
        raise WeightDtypeError(f"{where} is on the meta device, without values: load the weights first")
    if value.is_inference():
        raise WeightDtypeError(
            f"{where} was made under torch.inference_mode() and cannot be trained through: make or load the "
            "model outside of it"
        )
    if value.layout is not torch.strided:
        raise WeightDtypeError(f"{where} has layout {value.layout}: masks need dense weights, .to_dense()")
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise WeightDtypeError(f"{where} is an expanded tensor, whose weights share memory: clone() it first")
    if not value.is_floating_point():
        raise WeightDtypeError(f"{where} is {value.dtype}: scores need floating-point weights")
    if value.element_size() < 2:
        raise WeightDtypeError(
            f"{where} is {value.dtype}, in which PyTorch does not multiply: search in torch.bfloat16 or wider"
        )
    if not torch.isfinite(value.detach()).all():
        raise WeightValueError(f"{where} holds NaN or infinite values: the checkpoint is damaged")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.sparse:
            raise ConfigListError(f"{where}: sparse=True gives sparse gradients; set module.sparse = False")
        if module.max_norm is not None:
            raise ConfigListError(f"{where}: max_norm changes the weights in every forward; set it to None")


def _what_else(module: nn.Module, name: str) -> str:
    """Describe an attribute that is not a parameter, and how to make it one."""
    for form, remedy in _COMPUTED_WEIGHTS.items():
        if hasattr(module, form.format(name)):
            of = ", ".join(n for n in (*module._parameters, *module._buffers) if n.startswith(f"{name}_"))
            return f"computed from {of} before every forward: {remedy.format(name)} first"
    if name in module._buffers:
        return "a buffer: make it a torch.nn.Parameter"
    kind = "a property" if isinstance(getattr(type(module), name, None), property) else "an attribute"
    return f"{kind} of {type(module).__name__}: leave the module out of the config list"


def refuse_other_readers(model: nn.Module, searched: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that can be read without going through the module that holds them.

    Parameters
    ----------
    model
        The unwrapped model.
    searched
        The parameters to mask, by name.

    Raises
    ------
    ConfigListError
        If a module also has one of them in a plain attribute, such as ``_flat_weights`` of ``nn.LSTM``, or
        another tensor shares its memory.
    """
    names = {id(parameter): name for name, parameter in searched.items()}
    known = set(model.modules())
    for prefix, module in model.named_modules():
        # These modules list parameters for communication between processes, and do not compute with them.
        if type(module).__module__.startswith("torch.nn.parallel."):
            continue
        for attribute, value in vars(module).items():
            if attribute in _HELD_BY_MODULES:
                continue
            for held in _contained(value, known):
                if (name := names.get(id(held))) is not None:
                    raise ConfigListError(
                        f"{name} is also read from {join(prefix, attribute)} of a {type(module).__name__}, "
                        "where no mask can be applied: leave it out of the config list"
                    )
    reached: tuple[tuple[int, int], str, bool] | None = None
    for start, end, name, is_searched in sorted(_spans(model, names)):
        if reached is not None and start < reached[0] and (is_searched or reached[2]):
            raise ConfigListError(
                f"{reached[1]} and {name} are two tensors in one memory: make them one "
                "torch.nn.Parameter, or leave both out of the config list"
            )
        if reached is None or end > reached[0]:
            reached = end, name, is_searched


def _contained(value: Any, known: Container[nn.Module]) -> Iterator[Any]:
    """Iterate over the items of an attribute; a module outside the model counts as its parameters."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple | set) else (value,):
        if isinstance(item, nn.Module):
            yield from () if item in known else item.parameters()
        else:
            yield item


def _spans(
    model: nn.Module, searched: Container[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], str, bool]]:
    """Iterate over ``(begin, end, name, is_searched)`` of parameters and buffers; begin and end in memory."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
            continue
        device = tensor.device.index or 0
        length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        end = start + length * tensor.element_size()
        yield (device, start), (device, end), name, id(tensor) in searched
