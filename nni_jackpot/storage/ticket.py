"""The jackpot as a file: coded masks, adapted norm statistics, and the identity of their weights.

A jackpot changes no weight, so it is its mask. Beside weights that are public or deployed already it takes
half a bit a weight, at 90 % sparsity. The base is every tensor of a state dict but the norm statistics, which
a search adapts and the ticket brings along: it has the SHA-256 of each of them, and goes with no others.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nni_jackpot.errors import MaskError, OtherBaseError, TicketError
from nni_jackpot.masks import Masks, check_shape, named_masks
from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_state import Model, aliases, base_state, check_writable, parameters_of, state_of
from nni_jackpot.storage.formats.byte_planes import Form, pack, unpack
from nni_jackpot.storage.formats.mask_codec import check, decode, encode
from nni_jackpot.storage.formats.rules import saying
from nni_jackpot.storage.formats.sealed import (
    DTYPES,
    digest_of,
    name_of,
    read_parts,
    write_sealed,
)
from nni_jackpot.storage.norm_statistics import check_values, statistics_of
from nni_jackpot.storage.ticket_format import (
    DIGEST_SIZE,
    CodedMasks,
    check_claim,
    is_parameter,
    named,
    parse,
)

KIND = "jackpot ticket"
VERSION = 1


class MaskFinder(Protocol):
    """What has found masks: NNI's pruners."""

    config_list: list[dict[str, Any]]

    def get_masks(self) -> Masks:
        """Return the masks."""


@dataclass(frozen=True)
class Ticket:
    """A jackpot without its base, as `load_ticket` reads it: masks are decoded when they are needed.

    Attributes
    ----------
    coded
        The masks, as NNI has them but coded.
    base
        SHA-256 of every base tensor by its name in the state dict (`formats.sealed.digest_of`).
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

        Raises
        ------
        TicketError
            If they cannot be decoded, or claim to be larger than a ticket of so few bytes could need.
        """
        check_claim(self.coded, sum(self.nbytes.values()))
        return {
            module: {
                target: None if mask is None else decode(mask).to(DTYPES[mask.dtype])
                for target, mask in targets.items()
            }
            for module, targets in self.coded.items()
        }

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The adapted norm statistics by their names in the state dict.

        Raises
        ------
        TicketError
            If they cannot be decoded, or are not the statistics of any norm.
        """
        tensors = unpack(self._packed, list(self._statistics.values()))
        statistics = dict(zip(self._statistics, tensors, strict=True))
        for name, values in statistics.items():
            check_values(name, values)
        return statistics

    @property
    def sparsity(self) -> float:
        """Share of zeros over all targets that are pruned at all, together."""
        pruned = [mask for *_, mask in named(self.coded) if mask.kept < mask.size]
        return 1 - sum(mask.kept for mask in pruned) / sum(mask.size for mask in pruned) if pruned else 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of its parts, in the file and in memory: ``masks``, ``statistics`` and ``base``."""
        streams = sum(len(mask.stream) for *_, mask in named(self.coded))
        return {"masks": streams, "statistics": len(self._packed), "base": DIGEST_SIZE * len(self.base)}

    def check_base(self, model: Model) -> None:
        """See that a model, or a state dict, is the base that the ticket was found on.

        Norm statistics may have any values, for the ticket brings its own.

        Raises
        ------
        OtherBaseError
            If a tensor is missing, unknown, differs in type, shape or any bit, or is no norm statistic where
            the ticket says so.
        MaskError
            If the model is still wrapped by NNI.
        """
        self.compare(state_of(model), parameters_of(model))

    def compare(self, state: Mapping[str, Tensor], parameters: Container[str]) -> None:
        """Do what `check_base` does, for tensors by name and the names of those that are parameters."""
        shapes = {name: mask.shape for name, target, mask in named(self.coded) if is_parameter(target)}
        known = set(statistics_of(state, parameters))
        wrong = [f"{name} is missing" for name in (*self.base, *self._statistics) if name not in state]
        for name, tensor in state.items():
            form = _form(tensor)
            if name in self._statistics:
                if form != str(self._statistics[name]):
                    wrong.append(f"{name} is {form}, not {self._statistics[name]}")
                elif name not in known:
                    wrong.append(f"{name} is no norm statistic")
            elif name not in self.base:
                wrong.append(f"{name} is unknown")
            elif shapes.get(name, tensor.shape) != tensor.shape:
                wrong.append(f"{name} is {form}, its mask of shape {list(shapes[name])}")
        if not wrong:  # the hashes take time
            wrong = [
                f"{name} (here {_form(state[name])}) differs"
                for name, digest in self.base.items()
                if digest_of(state[name]) != digest
            ]
        if wrong:
            first = "; ".join(map(escaped, wrong[:3]))
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise OtherBaseError(f"the ticket was found on another base: {first}{more}")

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
                raise MaskError(
                    f"the ticket prunes {escaped(name)}, which is no parameter: hand its masks to NNI"
                )
            with saying(f"the mask of {escaped(name)}"):
                check(mask)
        _ = self.statistics

    def check_writable(self, model: Model) -> None:
        """See that what the ticket changes of its base can be written in place, and is nobody else's memory.

        Raises
        ------
        MaskError
            If it cannot be written, norm statistics share memory with other tensors, or two masks of one
            tensor differ.
        """
        state = state_of(model)
        check_writable(state, self.masked, self._statistics)
        coded = {name: mask for name, _, mask in named(self.coded)}
        for first, name in aliases(state, self.masked):
            if coded[first] != coded[name] and not torch.equal(decode(coded[first]), decode(coded[name])):
                raise MaskError(
                    f"{escaped(first)} and {escaped(name)} are one tensor, and their masks differ"
                )

    @property
    def masked(self) -> list[str]:
        """The names in the state dict of the parameters that have a mask."""
        return [name for name, target, _ in named(self.coded) if is_parameter(target)]

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
            If the model is still wrapped by NNI, inputs or outputs are pruned, or the model's tensors cannot
            be written.
        """
        self.check_base(model)
        self.check_writable(model)
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
    masks: Masks | MaskFinder,
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
        If the metadata are not plain data, or no reader would take the ticket.
    OutputFolderError
        If the folder cannot be written; the file is whole or not there.
    """
    metadata = dict(metadata or {})
    if not isinstance(masks, Mapping):
        metadata.setdefault("config_list", masks.config_list)
        masks = masks.get_masks()
    state = base_state(model)
    _refuse_applied(masks_by_name(masks, state), state)
    statistics = {name: state.pop(name) for name in statistics_of(state, parameters_of(model))}
    for name, values in statistics.items():
        check_values(name, values)
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
        "statistics": {
            name: [(form := Form.of(t)).dtype, list(form.shape)] for name, t in statistics.items()
        },
        "metadata": metadata,
    }
    digests = b"".join(digest_of(tensor) for tensor in state.values())
    streams = {f"mask.{name}": mask.stream for name, _, mask in named(coded) if mask.stream}
    parts = {"base": digests, "statistics": pack(list(statistics.values())), **streams}
    parse(content, parts)
    tensors = {name: from_bytes(part) for name, part in parts.items()}
    try:
        write_sealed(path, KIND, VERSION, content, tensors)
    except TicketError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise TicketError(f"the metadata of a ticket must be what JSON can hold: {error}") from error


def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Read a ticket, masks still coded.

    No code of the file is run. The rules of the format (docs/ticket-format.md) are checked, and no more
    memory is taken than twice the bytes of the file, or 6 MiB more where it is small.

    Raises
    ------
    TicketError
        If the file is missing, damaged, no ticket, breaks a rule of the format, or is of a newer version.
    """
    content, parts = read_parts(path, KIND, VERSION)
    with saying(f"{path} is damaged"):
        coded, base, statistics = parse(content, parts)
    return Ticket(coded, base, content["metadata"], statistics, parts["statistics"])


def masks_by_name(masks: Masks, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of parameters by their names in a state dict.

    Raises
    ------
    MaskError
        If a mask does not fit the state dict, or differs from another one of the same tensor.
    """
    by_name = {
        name: mask for name, mask in named_masks(masks).items() if is_parameter(name.rpartition(".")[2])
    }
    for name, mask in by_name.items():
        if name not in state:
            raise MaskError(f"the model has no parameter {escaped(name)}")
        check_shape(escaped(name), mask, state[name].shape)
    for first, name in aliases(state, by_name):
        if not torch.equal(by_name[first].bool(), by_name[name].to(by_name[first].device).bool()):
            raise _two_masks(first, name)
    return by_name


def _two_masks(first: str, name: str) -> MaskError:
    return MaskError(f"{escaped(first)} and {escaped(name)} are one tensor, and their masks differ")


def _form(tensor: Tensor) -> str:
    """Return type and shape of a tensor of any type, as `Form` shows those of statistics."""
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"


def _refuse_applied(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """See that the weights are still there, or nobody's base would ever fit the ticket."""
    is_pruned = any(not mask.all() for mask in masks.values())
    weights = (state[name].bool() & mask.logical_not().to(state[name].device) for name, mask in masks.items())
    if is_pruned and not any(bool(there.any()) for there in weights):
        raise MaskError("the weights that the masks prune are zero already: save tickets before apply_masks")
