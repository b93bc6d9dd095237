"""Compare, count, save, load and apply NNI masks.

Masks have NNI's form: ``{module name: {target name: 0/1 tensor of the target's shape, or None}}``. Every
function here raises `MaskError` for any other form.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_jackpot.errors import CheckpointError, JackpotError, MaskError, first_line
from nni_jackpot.modules.parameters import join, names_of_all, parametrized, remove_parametrizations
from nni_jackpot.runtime.files import load_tensors, replace_file, save_tensors

Masks: TypeAlias = Mapping[str, Mapping[str, Tensor | None]]

# Parts of names added by (Distributed)DataParallel, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class MaskOverlap:
    """Overlap of two masks (Eq. 7), in [0, 1].

    Attributes
    ----------
    total
        Overlap over the weights of all targets.
    per_target
        ``{"module.target": overlap}``.
    """

    total: float
    per_target: dict[str, float]


def mask_overlap(masks_a: Masks, masks_b: Masks) -> MaskOverlap:
    """Return the share of weights that both masks keep or both prune (Eq. 7).

    Targets that neither mask prunes, such as biases, do not count.

    Raises
    ------
    MaskError
        If the masks have different targets or shapes.
    """
    a, b = named_masks(masks_a), named_masks(masks_b)
    names = match_names(b, a)
    if len({*names.values()}) == len(names):
        b = {names.get(name, name): mask for name, mask in b.items()}
    if a.keys() != b.keys():
        raise MaskError(
            f"the masks are about different targets: {sorted(a.keys() ^ b.keys())} are in one only"
        )
    agreeing: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, mask_a in a.items():
        if mask_a.shape != b[name].shape:
            raise MaskError(
                f"the masks of {name} have shapes {tuple(mask_a.shape)} and {tuple(b[name].shape)}"
            )
        bool_a, bool_b = mask_a.bool(), b[name].to(mask_a.device).bool()
        if bool_a.all() and bool_b.all():
            continue
        agreeing[name] = int((bool_a == bool_b).sum())
        sizes[name] = bool_a.numel()
    total = sum(agreeing.values()) / sum(sizes.values()) if sizes else 1.0
    return MaskOverlap(total, {name: agreeing[name] / sizes[name] for name in sizes})


def densities(masks: Masks) -> dict[str, float]:
    """Return the share of kept weights per target, ``{"module.target": density}``."""
    return {name: int(mask.bool().sum()) / max(mask.numel(), 1) for name, mask in named_masks(masks).items()}


def sparsity_of(masks: Masks, targets: Collection[str] | None = None) -> float:
    """Return the share of zeros over targets.

    Parameters
    ----------
    masks
        The masks.
    targets
        What counts, by name; None for all targets with at least one zero, as NNI's masks have some of ones
        for what is not pruned, such as biases.
    """
    kept = {name: mask.bool() for name, mask in named_masks(masks).items()}
    if targets is None:
        targets = [name for name, mask in kept.items() if not mask.all()]
    pruned = [kept[name] for name in targets if name in kept]
    zeros = sum(int(mask.logical_not().sum()) for mask in pruned)
    return zeros / max(1, sum(mask.numel() for mask in pruned))


def save_masks(masks: Masks, path: str | os.PathLike[str]) -> None:
    """Save masks as the file that ``ModelSpeedup(model, dummy_input, path)`` reads.

    Raises
    ------
    MaskError
        If the masks do not have NNI's form.
    OutputFolderError
        If the folder cannot be written. The write is atomic.
    """
    named_masks(masks)
    plain = {
        module: {target: None if mask is None else mask.cpu() for target, mask in targets.items()}
        for module, targets in masks.items()
    }
    replace_file(path, lambda temporary: save_tensors(plain, temporary))


def load_masks(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor | None]]:
    """Load masks saved by `save_masks` or by ``torch.save(masks, path)``, without executing code of the file.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or does not contain masks.
    """
    masks = load_tensors(path, "mask file")
    try:
        named_masks(masks)
    except MaskError as error:
        raise CheckpointError(f"{path} holds no masks: {error}") from None
    return masks


def apply_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Set the pruned weights of a model to zero, in place; kept weights are unchanged bit for bit.

    A masked weight that parametrizations compute becomes a plain parameter with its current value.

    Parameters
    ----------
    model
        The unwrapped model; call ``pruner.unwrap_model()`` first.
    masks
        NNI's masks of this model, with or without a wrapper such as DistributedDataParallel around it.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    MaskError
        If the model is still wrapped by NNI, or a mask cannot be applied; the model is then unchanged.
    """
    fitting = fit_masks(model, masks)
    remove_parametrizations(model, fitting)
    parameters = names_of_all(model)
    with torch.no_grad():
        for name, mask in fitting.items():
            parameters[name].masked_fill_(mask.to(parameters[name].device).bool().logical_not(), 0)
    return model


def fit_masks(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Check that masks can be applied to a model, and return them by the names of their parameters there.

    Raises
    ------
    MaskError
        If the model is still wrapped by NNI, a mask has no parameter, has another shape than its parameter,
        or differs from another mask of the same parameter, or a parameter cannot be written.
    """
    check_unwrapped(model)
    parameters = parameters_of(model)
    given = named_masks(masks)
    names = match_names(given, parameters)
    first: dict[Tensor, str] = {}  # tied weights are one parameter with several names
    for name, mask in given.items():
        if name not in names:
            bare = _without_wrappers(name)
            also = f", nor exactly one that is {bare} without wrappers" if bare != name else ""
            raise MaskError(f"the model has no parameter {name}{also}")
        parameter = parameters[names[name]]
        _check_writable(name, parameter)
        check_shape(name, mask, parameter.shape)
        other = given[first.setdefault(parameter, name)]
        if other is not mask and not torch.equal(other.bool(), mask.to(other.device).bool()):
            raise MaskError(f"{first[parameter]} and {name} are one parameter, and their masks differ")
    return {names[name]: mask for name, mask in given.items()}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that a mask can be applied to, by name; tied weights under each of their names."""
    return {**names_of_all(model), **parametrized(model)}


def check_unwrapped(model: nn.Module, error: type[JackpotError] = MaskError) -> None:
    """Check that no module of a model is wrapped by NNI.

    Raises
    ------
    JackpotError
        If a module is wrapped; the error has the type ``error``.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise error("the model is still wrapped by NNI: call pruner.unwrap_model() first")


def check_shape(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Check that the mask of a target has the target's shape.

    Raises
    ------
    MaskError
        If the shapes differ.
    """
    if tuple(mask.shape) != tuple(shape):
        raise MaskError(f"the mask of {name} has shape {tuple(mask.shape)}, expected {tuple(shape)}")


def named_masks(masks: Masks) -> dict[str, Tensor]:
    """Return ``{"module.target": mask}`` for all targets with a mask.

    Raises
    ------
    MaskError
        If the masks do not have NNI's form, or contain values other than 0 and 1.
    """
    if not isinstance(masks, Mapping):
        raise MaskError(f"masks are {{module: {{target: mask}}}}, not a {type(masks).__name__}")
    named: dict[str, Tensor] = {}
    for module, targets in masks.items():
        if not isinstance(targets, Mapping):
            raise MaskError(_nested(module, targets))
        for target, mask in targets.items():
            if mask is not None:
                name = join(module, target)
                if name in named:
                    raise MaskError(f"there are two masks of {name}")
                _check_mask(name, mask)
                named[name] = mask
    return named


def by_module(named: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | None]]:
    """Return masks by the names of parameters in NNI's form: the inverse of `named_masks`."""
    masks: dict[str, dict[str, Tensor | None]] = {}
    for name, mask in named.items():
        module, _, target = name.rpartition(".")
        masks.setdefault(module, {})[target] = mask
    return masks


def match_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Map names to known names: the equal one, or the only one that is equal without wrappers."""
    known = set(known)
    bare: defaultdict[str, list[str]] = defaultdict(list)
    for name in known:
        bare[_without_wrappers(name)].append(name)
    found = {name: [name] if name in known else bare[_without_wrappers(name)] for name in names}
    return {name: matches[0] for name, matches in found.items() if len(matches) == 1}


def _nested(name: str, mask: object) -> str:
    """Return the error message for masks that are not nested."""
    form = "masks are {module: {target: mask}}"
    if not isinstance(name, str) or not isinstance(mask, Tensor):
        return f"{form}: the entry {name!r} is a {type(mask).__name__}"
    module, _, target = name.rpartition(".")
    if not module and target not in ("weight", "bias"):
        module, target = target, "weight"
    return f'{form}: write {{"{module}": {{"{target}": mask}}}} for "{name}"'


def _check_mask(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise MaskError(f"the mask of {name} is a {type(mask).__name__}, not a tensor")
    if mask.layout != torch.strided or mask.is_meta:
        kind = "on the meta device" if mask.is_meta else f"of layout {mask.layout}"
        raise MaskError(f"the mask of {name} is {kind}, not a dense tensor of zeros and ones")
    if not torch.equal(mask, mask.bool().to(mask.dtype)):
        raise MaskError(f"the mask of {name} holds values other than 0 and 1")


def _check_writable(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter) or parameter.is_meta:
        raise MaskError(f"{name} has no values yet: load or initialise the model first")
    if not parameter.is_leaf:
        raise MaskError(f"{name} is computed from other tensors: mask the parameters among these")
    try:
        with torch.no_grad():
            parameter.masked_fill_(torch.zeros((), dtype=torch.bool, device=parameter.device), 0)
    except RuntimeError as error:  # an inference tensor, a dtype without this operation
        reason = first_line(error)
        raise MaskError(f"zeros cannot be written into {name}, of {parameter.dtype}: {reason}") from None


def _without_wrappers(name: str) -> str:
    module, _, target = name.rpartition(".")
    return ".".join([*(part for part in module.split(".") if part and part not in _WRAPPERS), target])
