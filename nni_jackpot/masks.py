"""NNI masks as values: compared, counted, saved, loaded and written into a model.

Masks are NNI's: ``{module name: {target name: 0/1 tensor of the target's shape, or None}}``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nni_jackpot.errors import CheckpointError, MaskError
from nni_jackpot.files import load_tensors, replace_file, save_tensors

Masks: TypeAlias = Mapping[str, Mapping[str, Tensor | None]]


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
    a, b = dict(_named(masks_a)), dict(_named(masks_b))
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
    return {name: mask.count_nonzero().item() / max(mask.numel(), 1) for name, mask in _named(masks)}


def sparsity_of(masks: Masks) -> float:
    """Return the share of zeros over all targets that are pruned at all, together."""
    pruned = [mask for _, mask in _named(masks) if not mask.all()]
    zeros = sum(int((mask == 0).sum()) for mask in pruned)
    return zeros / max(1, sum(mask.numel() for mask in pruned))


def save_masks(masks: Masks, path: str | os.PathLike[str]) -> None:
    """Save masks as the file that ``ModelSpeedup(model, dummy_input, path)`` reads.

    Raises
    ------
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    """
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
    if not isinstance(masks, dict) or not all(
        isinstance(targets, dict)
        and all(mask is None or isinstance(mask, Tensor) for mask in targets.values())
        for targets in masks.values()
    ):
        raise CheckpointError(f"{path} holds no masks of the form {{module: {{target: tensor}}}}")
    return masks


def apply_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Write the masks' zeros into the weights of a plain model, in place; kept weights stay bit for bit.

    Parameters
    ----------
    model
        The unwrapped model; call ``pruner.unwrap_model()`` first.

    Returns
    -------
    nn.Module
        The same model.

    Raises
    ------
    MaskError
        If the model is still wrapped, or a mask fits none of its parameters; the model is then unchanged.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise MaskError("the model is still wrapped by NNI: call pruner.unwrap_model() first")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in _named(masks):
        if name not in parameters:
            raise MaskError(f"the model has no parameter {name}")
        if parameters[name].shape != mask.shape:
            expected, found = tuple(parameters[name].shape), tuple(mask.shape)
            raise MaskError(f"the mask of {name} has shape {found}, its parameter {expected}")
    with torch.no_grad():
        for name, mask in _named(masks):
            parameters[name].masked_fill_(mask.to(parameters[name].device) == 0, 0)
    return model


def _named(masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """Iterate over ``("module.target", mask)``, targets without a mask left out."""
    for module, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                yield f"{module}.{target}" if module else target, mask
