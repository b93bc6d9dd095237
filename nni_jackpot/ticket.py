"""The jackpot as a file: coded masks, adapted norm statistics, and the identity of their weights.

A jackpot changes no weight, so it is its mask. Beside weights that are public or deployed already it takes
half a bit a weight, at 90 % sparsity. The base is every tensor of a state dict but the norm statistics, which
a search adapts and the ticket brings along: it has the SHA-256 of each of them, and goes with no others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX
from torch import Tensor, nn

from nni_jackpot.attributes import plain_state
from nni_jackpot.byte_planes import Form, pack, unpack
from nni_jackpot.errors import MaskError, OtherBaseError, TicketError
from nni_jackpot.mask_codec import CodedMask, decode, encode
from nni_jackpot.masks import Masks
from nni_jackpot.sealed import DTYPES, digest_of, from_bytes, read_sealed, write_sealed

KIND = "jackpot ticket"
VERSION = 1

Model = nn.Module | Mapping[str, Tensor]
CodedMasks = Mapping[str, Mapping[str, CodedMask | None]]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_ACTIVATIONS = (INPUT_PREFIX, OUTPUT_PREFIX)
_DIGEST_SIZE = 32


@dataclass(frozen=True)
class Ticket:
    """A jackpot without its base, as `load_ticket` reads it: masks are decoded when they are needed.

    Attributes
    ----------
    coded
        The masks, as NNI has them but coded.
    base
        SHA-256 of every base tensor by its name in the state dict (`nni_jackpot.sealed.digest_of`).
    metadata
        What the ticket was saved with: config list, metrics and the like.
    """

    coded: CodedMasks
    base: Mapping[str, bytes]
    metadata: Mapping[str, Any]
    _statistics: Mapping[str, Form]
    _packed: bytes

    @property
    def masks(self) -> dict[str, dict[str, Tensor | None]]:
        """The masks as NNI has them, all decoded at once.

        Their shapes are the ticket's own claim. If you do not know where it comes from, have `check_base`
        compare them with your model's first.
        """
        return {
            module: {
                target: None if mask is None else decode(mask).to(DTYPES[mask.dtype])
                for target, mask in targets.items()
            }
            for module, targets in self.coded.items()
        }

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The adapted norm statistics by their names in the state dict."""
        tensors = unpack(self._packed, list(self._statistics.values()))
        return dict(zip(self._statistics, tensors, strict=True))

    @property
    def sparsity(self) -> float:
        """Share of zeros over all targets that are pruned at all, together."""
        pruned = [mask for *_, mask in named(self.coded) if mask.kept < mask.size]
        return 1 - sum(mask.kept for mask in pruned) / sum(mask.size for mask in pruned) if pruned else 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of its parts, in the file and in memory: ``masks``, ``statistics`` and ``base``."""
        streams = sum(len(mask.stream) for *_, mask in named(self.coded))
        return {"masks": streams, "statistics": len(self._packed), "base": _DIGEST_SIZE * len(self.base)}

    def check_base(self, model: Model) -> None:
        """See that a model, or a state dict, is the base that the ticket was found on.

        Norm statistics may have any values, for the ticket brings its own.

        Raises
        ------
        OtherBaseError
            If a tensor is missing, unknown, or differs in type, shape or any bit.
        MaskError
            If the model is still wrapped by NNI.
        """
        state = state_of(model)
        shapes = {name: mask.shape for name, target, mask in named(self.coded) if is_parameter(target)}
        wrong = [f"{name} is missing" for name in (*self.base, *self._statistics) if name not in state]
        for name, tensor in state.items():
            form = Form.of(tensor)
            if name in self._statistics:
                if form != self._statistics[name]:
                    wrong.append(f"{name} is {form}, not {self._statistics[name]}")
            elif name not in self.base:
                wrong.append(f"{name} is unknown")
            elif shapes.get(name, form.shape) != form.shape:
                wrong.append(f"{name} is {form}, its mask of shape {list(shapes[name])}")
        if not wrong:  # the hashes take time
            wrong = [
                f"{name} (here {Form.of(state[name])}) differs"
                for name, digest in self.base.items()
                if digest_of(state[name]) != digest
            ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise OtherBaseError(f"the ticket was found on another base: {'; '.join(wrong[:3])}{more}")

    def check_masks(self) -> None:
        """See that all that the ticket holds can be decoded, and written into weights.

        Raises
        ------
        TicketError
            If masks or statistics cannot be decoded.
        MaskError
            If inputs or outputs are pruned, which no weight stands for.
        """
        for name, target, mask in named(self.coded):
            if not is_parameter(target) and mask.kept < mask.size:
                raise MaskError(f"the ticket prunes {name}, which is no parameter: hand its masks to NNI")
            decode(mask)
        unpack(self._packed, list(self._statistics.values()))

    def apply(self, model: Model) -> None:
        """Write zeros and norm statistics into a model, or a state dict, in place.

        Kept weights stay bit for bit. What may be wrong is found before anything is written.

        Raises
        ------
        OtherBaseError
            If it is not the base that the ticket was found on.
        TicketError
            If masks or statistics cannot be decoded.
        MaskError
            If the model is still wrapped by NNI, or inputs or outputs are pruned.
        """
        self.check_base(model)
        self.check_masks()
        self.write(model)

    def write(self, model: Model) -> None:
        """Do what `apply` does, where the checks have been made."""
        state = state_of(model)
        with torch.no_grad():
            for name, values in self.statistics.items():
                state[name].copy_(values)
            for name, target, mask in named(self.coded):
                if is_parameter(target):
                    state[name].masked_fill_(decode(mask).logical_not_().to(state[name].device), 0)


def save_ticket(
    path: str | os.PathLike[str],
    masks: Masks | Pruner,
    model: Model,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Save a jackpot as a ticket.

    Parameters
    ----------
    path
        The file.
    masks
        NNI masks, or the pruner that found them, whose config list then becomes part of the metadata.
    model
        The model they were found in, wrapped or not, or its state dict; its weights as they came, before
        `apply_masks`. Its norm statistics become part of the ticket.
    metadata
        What should be known of it, as plain data: ``{"config_list": ..., "metrics": ..., "seed": 0}``.

    Raises
    ------
    MaskError
        If a mask does not fit the model, holds other than 0 and 1, or has been applied already.
    TicketError
        If the metadata are not plain data.
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    """
    metadata = dict(metadata or {})
    if isinstance(masks, Pruner):
        metadata.setdefault("config_list", masks.config_list)
        masks = masks.get_masks()
    state = _base_state(model)
    _refuse_applied(masks_by_name(masks, state), state)
    statistics = {name: state.pop(name) for name in list(state) if is_statistic(name)}
    coded: CodedMasks = {
        module: {target: None if mask is None else encode(mask) for target, mask in targets.items()}
        for module, targets in masks.items()
    }
    content = {
        "masks": {
            module: {target: None if mask is None else mask.describe() for target, mask in targets.items()}
            for module, targets in coded.items()
        },
        "base": list(state),
        "statistics": {name: [(form := Form.of(t)).dtype, form.shape] for name, t in statistics.items()},
        "metadata": metadata,
    }
    digests = b"".join(digest_of(tensor) for tensor in state.values())
    streams = {f"mask.{name}": mask.stream for name, _, mask in named(coded) if mask.stream}
    parts = {"base": digests, "statistics": pack(list(statistics.values())), **streams}
    tensors = {name: from_bytes(part) for name, part in parts.items()}
    try:
        write_sealed(path, KIND, VERSION, content, tensors)
    except (TypeError, ValueError, RecursionError) as error:
        raise TicketError(f"the metadata of a ticket must be what JSON can hold: {error}") from error


def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Read a ticket, masks still coded.

    No code of the file is run, and no more memory is taken than it has bytes.

    Raises
    ------
    TicketError
        If the file is missing, damaged, no ticket, or of a newer version.
    """
    content, tensors = read_sealed(path, KIND, VERSION)
    parts = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    try:
        coded = {
            module: {
                target: None
                if mask is None
                else CodedMask.described(mask, parts.pop(f"mask.{_join(module, target)}", b""))
                for target, mask in targets.items()
            }
            for module, targets in content["masks"].items()
        }
        digests = parts.pop("base")
        names = content["base"]
        if len(digests) != _DIGEST_SIZE * len(names):
            raise TicketError(f"{len(digests)} bytes are not the hashes of {len(names)} base tensors")
        base = {name: digests[i * _DIGEST_SIZE :][:_DIGEST_SIZE] for i, name in enumerate(names)}
        statistics = {
            name: Form(dtype, tuple(shape)) for name, (dtype, shape) in content["statistics"].items()
        }
        packed, metadata = parts.pop("statistics"), dict(content["metadata"])
        lost = [n for n, target, _ in named(coded) if is_parameter(target) and n not in base]
        if parts or lost:
            raise TicketError(f"nothing tells what {[*parts, *lost][0]} is of")
    except TicketError as error:
        raise TicketError(f"{path} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TicketError(f"{path} is damaged: its content is not that of a {KIND}") from None
    return Ticket(coded, base, metadata, statistics, packed)


def named(coded: CodedMasks) -> Iterator[tuple[str, str, CodedMask]]:
    """Iterate over the name in the state dict, NNI's target, and the mask; those that are None left out."""
    for module, targets in coded.items():
        for target, mask in targets.items():
            if mask is not None:
                yield _join(module, target), target, mask


def is_parameter(target: str) -> bool:
    """Tell whether NNI's target is a parameter, not an input or output."""
    return not target.startswith(_ACTIVATIONS)


def is_statistic(name: str) -> bool:
    """Tell whether a state dict has a norm statistic by this name."""
    return name.rpartition(".")[2] in _STATISTICS


_WRAPPER = "_nni_wrapper."


def state_of(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a plain model, or of its state dict: the very ones, not copies.

    Raises
    ------
    MaskError
        If the model is wrapped.
    """
    if isinstance(model, nn.Module) and any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise MaskError("the model is still wrapped by NNI: call pruner.unwrap_model() first")
    return _tensors_of(model)


def _tensors_of(model: Model) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _base_state(model: Model) -> dict[str, Tensor]:
    """Return the state dict as it is without NNI's wrappers, which keep the weights they mask."""
    tensors = plain_state(model) if isinstance(model, nn.Module) else _tensors_of(model)
    state = {name: tensor for name, tensor in tensors.items() if _WRAPPER not in name}
    if isinstance(model, nn.Module):
        return state
    for name in (name for name in tensors if _WRAPPER in name):
        stem, _, kind = name.rpartition("_")
        if not (kind in ("mask", "score") and stem in tensors):  # which have no place in it
            state[name.replace(_WRAPPER, "")] = tensors[name]
    return state


def masks_by_name(masks: Masks, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of parameters by their names in a state dict.

    Raises
    ------
    MaskError
        If a mask does not fit the state dict.
    """
    by_name = {
        _join(module, target): mask
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None and is_parameter(target)
    }
    for name, mask in by_name.items():
        if name not in state:
            raise MaskError(f"the model has no parameter {name}")
        if state[name].shape != mask.shape:
            expected, found = tuple(state[name].shape), tuple(mask.shape)
            raise MaskError(f"the mask of {name} has shape {found}, its parameter {expected}")
    return by_name


def _refuse_applied(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """See that the weights are still there, or nobody's base would ever fit the ticket."""
    is_pruned = any(not mask.all() for mask in masks.values())
    weights = (state[name].bool() & mask.logical_not().to(state[name].device) for name, mask in masks.items())
    if is_pruned and not any(bool(there.any()) for there in weights):
        raise MaskError("the weights that the masks prune are zero already: save tickets before apply_masks")


def _join(module: str, target: str) -> str:
    return f"{module}.{target}" if module else target
