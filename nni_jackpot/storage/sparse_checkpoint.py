"""Sparse checkpoints: a sparse model as one file with its kept weights and coded masks.

A sparse checkpoint needs no base weights. At 90 % sparsity and 32 bits per number it takes 3.7 bits per
weight; a ticket takes half a bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.masks import Masks
from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_state import Model, state_of
from nni_jackpot.storage.formats import coded_mask, sealed_format
from nni_jackpot.storage.formats.coded_mask import CodedMask
from nni_jackpot.storage.formats.mask_codec import DECODED, decode, encode
from nni_jackpot.storage.formats.rules import Rule, error_prefix
from nni_jackpot.storage.formats.sealed import read_sealed, write_sealed
from nni_jackpot.storage.ticket import masks_by_name

KIND = "sparse checkpoint"
VERSION = 1

CONTENT = Rule("`content` is an object by name, of masks or null")
TENSORS = Rule(
    "the tensors are `whole.NAME` for each null; and for each mask `kept.NAME`, of one dimension and as many "
    "numbers as the mask keeps, and `mask.NAME`, of type `U8` and one dimension; there are no others"
)
CLAIM = Rule(
    "tensors with a mask have no more than 64 MiB, and 8192 bytes for every byte of the tensors in the file"
)
RULES = (*sealed_format.RULES, CONTENT, TENSORS, *coded_mask.RULES, CLAIM, DECODED)

_BYTES, _BYTES_A_BYTE = 1 << 26, 1 << 13


def save_sparse(path: str | os.PathLike[str], model: Model, masks: Masks) -> None:
    """Save the state dict of a sparse model, with only the kept weights of masked parameters.

    Parameters
    ----------
    path
        The file.
    model
        The unwrapped model, or its state dict, with the masks applied or not.
    masks
        NNI masks. Masks of inputs and outputs are left out, as a state dict does not contain them.

    Raises
    ------
    MaskError
        If the model is wrapped, or a mask does not fit the model or contains values other than 0 and 1.
    TicketError
        If `load_sparse` would refuse the file.
    OutputFolderError
        If the folder cannot be written. The write is atomic.
    """
    state = state_of(model)
    coded = {name: encode(mask) for name, mask in masks_by_name(masks, state).items() if not mask.all()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in coded:
            tensors[f"whole.{name}"] = tensor.clone()  # safetensors refuses tied weights, which share memory
            continue
        tensors[f"kept.{name}"] = tensor.cpu()[decode(coded[name])]
        tensors[f"mask.{name}"] = from_bytes(coded[name].stream)
    content = {name: coded[name].describe() if name in coded else None for name in state}
    _masks(content, tensors)
    write_sealed(path, KIND, VERSION, content, tensors)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a sparse checkpoint, on the CPU, with zeros for pruned weights.

    Raises
    ------
    TicketError
        If the file is missing, damaged, not a sparse checkpoint, or of a newer version. The size of the file
        bounds the memory used.
    """
    content, tensors = read_sealed(path, KIND, VERSION)
    with error_prefix(f"{path} is damaged"):
        coded = _masks(content, tensors)
        return {
            name: tensors[f"whole.{name}"] if mask is None else _dense(mask, tensors.pop(f"kept.{name}"))
            for name, mask in coded.items()
        }


def _masks(content: Any, tensors: Mapping[str, Tensor]) -> dict[str, CodedMask | None]:
    """Return the masks by name, after checking all rules except `DECODED`."""
    if not isinstance(content, dict):
        raise CONTENT.broken("the content")
    parts = {
        name: ["whole"] if described is None else ["kept", "mask"] for name, described in content.items()
    }
    others = tensors.keys() ^ {f"{part}.{name}" for name, needed in parts.items() for part in needed}
    if others:
        raise TENSORS.broken(f"tensor {min(others)}")
    masks = {name: _mask(name, described, tensors) for name, described in content.items()}
    claim = sum(
        mask.size * tensors[f"kept.{name}"].element_size() for name, mask in masks.items() if mask is not None
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claim > _BYTES + _BYTES_A_BYTE * size:
        raise CLAIM.broken(f"{claim:,} bytes in a file with tensors of {size:,}")
    return masks


def _mask(name: str, described: Any, tensors: Mapping[str, Tensor]) -> CodedMask | None:
    if described is None:
        return None
    stream, kept = tensors[f"mask.{name}"], tensors[f"kept.{name}"]
    if stream.dtype != torch.uint8 or stream.ndim != 1:
        raise TENSORS.broken(f"tensor mask.{name}")
    with error_prefix(f"the mask of {escaped(name)}"):
        mask = CodedMask.described(described, stream.numpy().tobytes())
    if kept.shape != (mask.kept,):
        raise TENSORS.broken(f"{list(kept.shape)} numbers for {mask.kept} places in {name}")
    return mask


def _dense(mask: CodedMask, kept: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=kept.dtype).masked_scatter_(decode(mask), kept)
