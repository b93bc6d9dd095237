"""Tickets: a jackpot as a file with coded masks, adapted norm statistics and the hashes of the base.

A search changes no weight, so the mask alone identifies a jackpot: half a bit per weight at 90 % sparsity,
next to weights that are public or already deployed. The *base* is every tensor of the state dict except the
norm statistics and tuned parameters, which the ticket contains. The ticket has the SHA-256 of every base
tensor, and can only be applied to these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nni_jackpot.errors import MaskError, OtherBaseError, TicketError, first_few
from nni_jackpot.masks import Masks, check_shape, named_masks
from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_state import Model, aliases, base_state, check_writable, parameters_of, state_of
from nni_jackpot.storage.formats.byte_planes import Form, pack, unpack
from nni_jackpot.storage.formats.deflated import deflated
from nni_jackpot.storage.formats.mask_codec import check, decode, encode
from nni_jackpot.storage.formats.rules import error_prefix
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
from nni_jackpot.storage.tuned_values import taken_out, values_of

KIND = "jackpot ticket"
VERSION = 3  # 2 without tuned parameters, and 1 where the content is short enough to be JSON as it is


class MaskFinder(Protocol):
    """An object that has found masks, such as an NNI pruner."""

    config_list: list[dict[str, Any]]

    def get_masks(self) -> Masks:
        """Return the masks."""


@dataclass(frozen=True)
class Ticket:
    """A jackpot without its base, as read by `load_ticket`; masks are decoded on use.

    Attributes
    ----------
    coded
        The coded masks, in NNI's form.
    base
        SHA-256 of every base tensor by its name in the state dict (`formats.sealed.digest_of`).
    metadata
        Plain data, such as config list and metrics.
    """

    coded: CodedMasks
    base: Mapping[str, bytes]
    metadata: Mapping[str, Any]
    _statistics: Mapping[str, Form]
    _tuned: Mapping[str, Form]
    _packed: bytes
    _packed_tuned: bytes

    @property
    def masks(self) -> dict[str, dict[str, Tensor | None]]:
        """The masks in NNI's form, all decoded.

        The shapes come from the file. For a ticket from an untrusted source, call `check_base` first: it
        compares the shapes with those of your model.

        Raises
        ------
        TicketError
            If a mask cannot be decoded, or the masks claim to be too large for the size of the ticket.
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
            If they cannot be decoded, or have invalid values.
        """
        tensors = unpack(self._packed, list(self._statistics.values()))
        statistics = dict(zip(self._statistics, tensors, strict=True))
        for name, values in statistics.items():
            check_values(name, values)
        return statistics

    @property
    def tuned(self) -> dict[str, Tensor]:
        """The parameters that the search has tuned, by their names in the state dict; raises TicketError."""
        return values_of(self._tuned, self._packed_tuned)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all targets with at least one zero."""
        pruned = [mask for *_, mask in named(self.coded) if mask.kept < mask.size]
        return 1 - sum(mask.kept for mask in pruned) / sum(mask.size for mask in pruned) if pruned else 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the parts, in the file and in memory: ``masks``, ``statistics`` and ``base``."""
        streams = sum(len(mask.stream) for *_, mask in named(self.coded))
        values = len(self._packed) + len(self._packed_tuned)
        return {"masks": streams, "statistics": values, "base": DIGEST_SIZE * len(self.base)}

    @property
    def names(self) -> list[str]:
        """The names of all tensors of the state dict."""
        return [*self.base, *self._statistics, *self._tuned]

    def check_base(self, model: Model) -> None:
        """Check that a model, or a state dict, is the base that the ticket was found on.

        Norm statistics may have any values, as the ticket replaces them.

        Raises
        ------
        OtherBaseError
            If a tensor is missing, unknown, differs in type, shape or any bit, or is not a norm statistic but
            the ticket has it as one.
        MaskError
            If the model is still wrapped by NNI.
        """
        self.compare(state_of(model), parameters_of(model))

    def compare(
        self,
        state: Mapping[str, Tensor],
        parameters: Container[str],
        digest: Callable[[str], bytes] | None = None,
    ) -> None:
        """Check tensors as `check_base` does.

        Parameters
        ----------
        state
            Tensors by name; only dtype and shape are read if ``digest`` is given.
        parameters
            Names of parameters, which are never norm statistics.
        digest
            Returns the hash of a tensor by its name; by default that of the tensor in ``state``.
        """
        found_digest = digest or (lambda name: digest_of(state[name]))
        shapes = {name: mask.shape for name, target, mask in named(self.coded) if is_parameter(target)}
        known = {*statistics_of(state, parameters), *self._tuned}
        forms = {**self._statistics, **self._tuned}
        wrong = [f"{name} is missing" for name in self.names if name not in state]
        for name, tensor in state.items():
            form = _form(tensor)
            if name in forms:
                if form != str(forms[name]):
                    wrong.append(f"{name} is {form}, not {forms[name]}")
                elif name not in known:
                    wrong.append(f"{name} is not a norm statistic")
                elif shapes.get(name, tensor.shape) != tensor.shape:
                    wrong.append(f"{name} is {form}, its mask of shape {list(shapes[name])}")
            elif name not in self.base:
                wrong.append(f"{name} is unknown")
            elif shapes.get(name, tensor.shape) != tensor.shape:
                wrong.append(f"{name} is {form}, its mask of shape {list(shapes[name])}")
        if not wrong:  # last, as hashes take time
            wrong = [
                f"{name} (here {_form(state[name])}) differs"
                for name, expected in self.base.items()
                if found_digest(name) != expected
            ]
        if wrong:
            findings = first_few([escaped(finding) for finding in wrong])
            raise OtherBaseError(f"the ticket was found on another base: {findings}")

    def check_masks(self) -> None:
        """Check that all masks and statistics can be decoded, and all masks written into weights.

        Raises
        ------
        TicketError
            If masks or statistics cannot be decoded.
        MaskError
            If the ticket prunes inputs or outputs, which are not in a state dict.
        """
        for name, target, mask in named(self.coded):
            if not is_parameter(target) and mask.kept < mask.size:
                raise MaskError(
                    f"the ticket prunes {escaped(name)}, which is not a parameter: pass its masks to NNI"
                )
            with error_prefix(f"the mask of {escaped(name)}"):
                check(mask)
        _ = self.statistics, self.tuned

    def check_writable(self, model: Model) -> None:
        """Check that masks and statistics can be written in place without changing other tensors.

        Raises
        ------
        MaskError
            If a tensor cannot be written, norm statistics share memory with other tensors, or two masks of
            one tensor differ.
        """
        state = state_of(model)
        check_writable(state, self.masked, {**self._statistics, **self._tuned})
        coded = {name: mask for name, _, mask in named(self.coded)}
        for first, name in aliases(state, self.masked):
            if coded[first] != coded[name] and not torch.equal(decode(coded[first]), decode(coded[name])):
                raise two_masks(first, name)

    @property
    def masked(self) -> list[str]:
        """The names of the masked parameters in the state dict."""
        return [name for name, target, _ in named(self.coded) if is_parameter(target)]

    def apply(self, model: Model) -> None:
        """Write zeros and norm statistics into a model, or a state dict, in place.

        Kept weights are unchanged bit for bit. All checks run before anything is written.

        Raises
        ------
        OtherBaseError
            If the model is not the base that the ticket was found on.
        TicketError
            If masks or statistics cannot be decoded.
        MaskError
            If the model is still wrapped by NNI, the ticket prunes inputs or outputs, or the model's tensors
            cannot be written.
        """
        self.check_base(model)
        self.check_writable(model)
        self.check_masks()
        self.write(model)

    def write(self, model: Model) -> None:
        """Write zeros and norm statistics as `apply` does, without its checks."""
        state = state_of(model)
        with torch.no_grad():
            for name, values in {**self.statistics, **self.tuned}.items():
                state[name].copy_(values)
            for name, target, mask in named(self.coded):
                if is_parameter(target):
                    state[name].masked_fill_(decode(mask).logical_not_().to(state[name].device), 0)


def save_ticket(
    path: str | os.PathLike[str],
    masks: Masks | MaskFinder,
    model: Model,
    metadata: Mapping[str, Any] | None = None,
    tuned: Collection[str] = (),
) -> None:
    """Save a jackpot as a ticket.

    Parameters
    ----------
    path
        The file.
    masks
        NNI masks, or the pruner that found them. The config list of a pruner is added to the metadata.
    model
        The searched model, wrapped or not, or its state dict, with the original weights (before
        `apply_masks`). Its norm statistics become part of the ticket.
    metadata
        Plain data about the jackpot: ``{"config_list": ..., "metrics": ..., "seed": 0}``.
    tuned
        Names of parameters that were trained along (``norm="tune"``); a pruner knows its own.

    Raises
    ------
    MaskError
        If a mask does not fit the model, contains values other than 0 and 1, or has already been applied.
    TicketError
        If the metadata are not plain data, or `load_ticket` would refuse the file.
    OutputFolderError
        If the folder cannot be written. The write is atomic.
    """
    metadata = dict(metadata or {})
    if not isinstance(masks, Mapping):
        metadata.setdefault("config_list", masks.config_list)
        tuned = tuned or getattr(masks, "tuned", ())
        masks = masks.get_masks()
    state = base_state(model)
    _refuse_applied(masks_by_name(masks, state), state)
    statistics = {name: state.pop(name) for name in statistics_of(state, parameters_of(model))}
    for name, values in statistics.items():
        check_values(name, values)
    tuned_values = taken_out(state, tuned)
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
        "statistics": _forms(statistics),
        "metadata": metadata,
        **({"tuned": _forms(tuned_values)} if tuned else {}),
    }
    digests = b"".join(digest_of(tensor) for tensor in state.values())
    streams = {f"mask.{name}": mask.stream for name, _, mask in named(coded) if mask.stream}
    parts = {"base": digests, "statistics": pack(list(statistics.values())), **streams}
    parts |= {"tuned": pack(list(tuned_values.values()))} if tuned else {}
    tensors = {name: from_bytes(part) for name, part in parts.items()}
    try:
        packed = deflated(content)
        written: Any = content if packed is None else packed
        parse(written, parts)
        write_sealed(path, KIND, VERSION if tuned else 1 if packed is None else 2, written, tensors)
    except TicketError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise TicketError(f"the metadata of a ticket must be what JSON can hold: {error}") from error


def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Read a ticket without decoding its masks.

    No code of the file is executed. The rules of the format (docs/ticket-format.md) are checked. Reading
    takes at most twice the size of the file in memory, plus 6 MiB.

    Raises
    ------
    TicketError
        If the file is missing, damaged, not a ticket, breaks a rule of the format, or is of a newer version.
    """
    content, parts = read_parts(path, KIND, VERSION)
    with error_prefix(f"{path} is damaged"):
        return Ticket(*parse(content, parts), parts["statistics"], parts.get("tuned", pack([])))


def masks_by_name(masks: Masks, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of parameters by their names in a state dict.

    Raises
    ------
    MaskError
        If a mask does not fit the state dict, or differs from another mask of the same tensor.
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
            raise two_masks(first, name)
    return by_name


def two_masks(first: str, name: str) -> MaskError:
    """Return the error for two names of one tensor with different masks."""
    return MaskError(f"{escaped(first)} and {escaped(name)} are one tensor, and their masks differ")


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [(form := Form.of(t)).dtype, list(form.shape)] for name, t in tensors.items()}


def _form(tensor: Tensor) -> str:
    """Return the dtype and shape of a tensor in the notation of `Form`; any dtype is allowed."""
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"


def _refuse_applied(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse weights to which the masks have been applied: no original base would match the hashes."""
    is_pruned = any(not mask.all() for mask in masks.values())
    weights = (state[name].bool() & mask.logical_not().to(state[name].device) for name, mask in masks.items())
    if is_pruned and not any(bool(nonzero.any()) for nonzero in weights):
        raise MaskError("the weights that the masks prune are zero already: save tickets before apply_masks")
