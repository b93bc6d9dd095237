"""NNI masks as values: compared, counted, saved, loaded and written into a model.

Masks are NNI's: ``{module name: {target name: 0/1 tensor of the target's shape, or None}}``. Every function
here raises `MaskError` for what is not of this form.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_jackpot.errors import CheckpointError, JackpotError, MaskError
from nni_jackpot.modules.parameters import names_of_all, parametrized, remove_parametrizations
from nni_jackpot.runtime.files import load_tensors, replace_file, save_tensors

Masks: TypeAlias = Mapping[str, Mapping[str, Tensor | None]]

# What wrappers put into names: (Distributed)DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class MaskOverlap:
    """Overlap of two masks (Eq. 7), in [0, 1].

    Attributes
    ----------
    total
        Over the weights of all targets together.
    per_target
        ``{"module.target": overlap}``.
    """

    total: float
    per_target: dict[str, float]


def mask_overlap(masks_a: Masks, masks_b: Masks) -> MaskOverlap:
    """Return the share of weights on which two masks agree, kept or pruned alike (Eq. 7).

    Targets that neither mask prunes, such as biases, are no part of the sparse structure and do not count.

    Raises
    ------
    MaskError
        If the masks are not about the same targets.
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
    """Return the share of ones per target, ``{"module.target": density}``."""
    return {name: int(mask.bool().sum()) / max(mask.numel(), 1) for name, mask in named_masks(masks).items()}


def sparsity_of(masks: Masks) -> float:
    """Return the share of zeros over all targets that are pruned at all, together."""
    pruned = [kept for mask in named_masks(masks).values() if not (kept := mask.bool()).all()]
    zeros = sum(int(kept.logical_not().sum()) for kept in pruned)
    return zeros / max(1, sum(kept.numel() for kept in pruned))


def save_masks(masks: Masks, path: str | os.PathLike[str]) -> None:
    """Save masks as the file that ``ModelSpeedup(model, dummy_input, path)`` reads.

    Raises
    ------
    MaskError
        If they are no masks.
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    """
    named_masks(masks)
    plain = {
        module: {target: None if mask is None else mask.cpu() for target, mask in targets.items()}
        for module, targets in masks.items()
    }
    replace_file(path, lambda aside: save_tensors(plain, aside))


def load_masks(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor | None]]:
    """Load masks saved by `save_masks` or by NNI's ``torch.save(masks, path)``; no code of the file is run.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or holds no masks.
    """
    masks = load_tensors(path, "mask file")
    try:
        named_masks(masks)
    except MaskError as error:
        raise CheckpointError(f"{path} holds no masks: {error}") from None
    return masks


def apply_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Write the masks' zeros into the weights of a plain model, in place; kept weights stay bit for bit.

    A masked weight that parametrizations compute becomes a parameter of its own, with the value that it has.

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
        If the model is still wrapped by NNI, or one of the masks cannot be applied; the model is then
        unchanged.
    """
    fitting = fit_masks(model, masks)
    remove_parametrizations(model, fitting)
    parameters = names_of_all(model)
    with torch.no_grad():
        for name, mask in fitting.items():
            parameters[name].masked_fill_(mask.to(parameters[name].device).bool().logical_not(), 0)
    return model


def fit_masks(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return masks by the names that their parameters have in the model, sure that they can be applied.

    Raises
    ------
    MaskError
        If the model is still wrapped by NNI, a mask has no parameter, not its shape, or differs from another
        mask of the same parameter, or a parameter cannot be written to.
    """
    check_unwrapped(model)
    parameters = parameters_of(model)
    given = named_masks(masks)
    names = match_names(given, parameters)
    first: dict[Tensor, str] = {}  # tied weights are one parameter of several names
    for name, mask in given.items():
        if name not in names:
            bare = _without_wrappers(name)
            also = f", nor a single one that is {bare} but for wrappers" if bare != name else ""
            raise MaskError(f"the model has no parameter {name}{also}")
        parameter = parameters[names[name]]
        _check_writable(name, parameter)
        check_shape(name, mask, parameter)
        other = given[first.setdefault(parameter, name)]
        if other is not mask and not torch.equal(other.bool(), mask.to(other.device).bool()):
            raise MaskError(f"{first[parameter]} and {name} are one parameter, and their masks differ")
    return {names[name]: mask for name, mask in given.items()}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all that a mask can be applied to, by name; tied weights under each of theirs."""
    return {**names_of_all(model), **parametrized(model)}


def check_unwrapped(model: nn.Module, error: type[JackpotError] = MaskError) -> None:
    """See that no module of a model is wrapped by NNI.

    Raises
    ------
    JackpotError
        Of the given type, if one is.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise error("the model is still wrapped by NNI: call pruner.unwrap_model() first")


def check_shape(name: str, mask: Tensor, parameter: Tensor) -> None:
    """See that a mask has the shape of its parameter.

    Raises
    ------
    MaskError
        If it has not.
    """
    if parameter.shape != mask.shape:
        expected, found = tuple(parameter.shape), tuple(mask.shape)
        raise MaskError(f"the mask of {name} has shape {found}, its parameter {expected}")


def named_masks(masks: Masks) -> dict[str, Tensor]:
    """Return ``{"module.target": mask}`` of all targets that have a mask.

    Raises
    ------
    MaskError
        If they are not masks of NNI's form, of zeros and ones.
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


def match_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return which known name each name is, as it stands or but for wrappers, where there is exactly one."""
    known = set(known)
    bare: defaultdict[str, list[str]] = defaultdict(list)
    for name in known:
        bare[_without_wrappers(name)].append(name)
    found = {name: [name] if name in known else bare[_without_wrappers(name)] for name in names}
    return {name: matches[0] for name, matches in found.items() if len(matches) == 1}


def join(module: str, target: str) -> str:
    """Return the name of a target in the model; those of the model itself have no module's name."""
    return f"{module}.{target}" if module else target


def _nested(name: str, mask: object) -> str:
    """Return what is wrong with masks that are not nested, and what would be right."""
    form = "masks are {module: {target: mask}}"
    if not isinstance(name, str) or not isinstance(mask, Tensor):
        return f"{form}: that of {name!r} is a {type(mask).__name__}"
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
        raise MaskError(f"{name} is computed from other tensors: mask those of them that are parameters")
    try:
        with torch.no_grad():
            parameter.masked_fill_(torch.zeros((), dtype=torch.bool, device=parameter.device), 0)
    except RuntimeError as error:  # an inference tensor, a type without such an operation
        reason = str(error).splitlines()[0]
        raise MaskError(f"zeros cannot be written into {name}, of {parameter.dtype}: {reason}") from None


def _without_wrappers(name: str) -> str:
    module, _, target = name.rpartition(".")
    return ".".join([*(part for part in module.split(".") if part and part not in _WRAPPERS), target])
