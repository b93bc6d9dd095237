"""Tickets applied to a folder of safetensors, tensor by tensor and file by file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nni_jackpot.errors import OtherBaseError, OutputFolderError
from nni_jackpot.runtime.files import create_folder
from nni_jackpot.runtime.tensor_bytes import as_bytes
from nni_jackpot.storage.formats.coded_mask import CodedMask
from nni_jackpot.storage.formats.mask_codec import decode
from nni_jackpot.storage.ticket import Ticket, two_masks
from nni_jackpot.storage.ticket_format import is_parameter, named
from nni_jackpot.storage.weight_folder import WeightFolder

_REMEDY = (
    "If the folder is the right one, its files hold the weights by other names or in another dtype than the "
    "model that was searched: load it by from_pretrained as for the search, call ticket.apply(model), then "
    "model.save_pretrained"
)


class BaseFolder:
    """The base of tickets as a folder of safetensors, such as ``save_pretrained`` and the Hub have it.

    No more than one tensor is in memory at a time. Every tensor is hashed once, however many tickets are
    applied. Nothing of the folder is run or unpickled.

    Parameters
    ----------
    path
        Folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and its files.

    Raises
    ------
    CheckpointError
        If the folder has no safetensors, or an index or a file is damaged. Pickles (``.bin``) and GGUF are
        refused.

    Examples
    --------
    >>> base = BaseFolder("smollm2")
    >>> base.apply(load_ticket("cats.ticket"), "smollm2-cats")
    >>> base.apply(load_ticket("dogs.ticket"), "smollm2-dogs")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._weights = WeightFolder(path)

    def apply(self, ticket: Ticket, output: str | os.PathLike[str]) -> None:
        """Write the sparse network of a ticket to a new folder, which `from_pretrained` loads.

        Kept weights are those of the base bit for bit. Config, tokenizer and other files are copied; weights
        in other formats are not. All checks run before anything is written, and the folder appears only when
        it is complete.

        Parameters
        ----------
        ticket
            A ticket of this base. Its names may have one prefix more or less than those of the folder
            (``model.``), and names of tied tensors may be missing in the folder.
        output
            The new folder; it must not exist, or be empty.

        Raises
        ------
        OtherBaseError
            If the folder is not the base that the ticket was found on.
        TicketError
            If masks or statistics cannot be decoded.
        MaskError
            If the ticket prunes inputs or outputs, or two masks of one tensor differ.
        CheckpointError
            If a file of the folder has changed since it was opened, or leads out of the folder.
        OutputFolderError
            If the output exists already, lies within the base, or cannot be written.
        """
        source = self._weights.path.resolve()
        if Path(output).resolve().is_relative_to(source):
            raise OutputFolderError(f"cannot write {output}: it lies within the base, {self._weights.path}")
        names = file_names(ticket, self._weights)
        self._check(ticket, names)
        changes = _changes(ticket, names)
        others = list(self._weights.other_files())
        create_folder(output, lambda folder: self._write(folder, changes, others))

    def _check(self, ticket: Ticket, names: Mapping[str, str]) -> None:
        """Check that the folder is the ticket's base, and that all of the ticket can be decoded."""
        weights = self._weights
        forms = {name: weights.form(file_name) for name, file_name in names.items()}
        prefix = _prefix_of_base(names)
        used = set(names.values())
        strangers = [name for name in weights.places if name not in used and name.startswith(prefix)]
        forms |= {name: weights.form(name) for name in strangers}
        try:
            ticket.compare(forms, (), lambda name: weights.digest(names[name]))
        except OtherBaseError as error:
            raise OtherBaseError(f"{error}. {_REMEDY}") from None
        ticket.check_masks()

    def _write(self, folder: Path, changes: Mapping[str, Tensor | CodedMask], others: list[Path]) -> None:
        weights = self._weights
        for inner in (*others, *map(Path, weights.files)):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(weights.path / inner, folder / inner)
        for name, change in changes.items():
            file, entry = weights.places[name]
            if isinstance(change, CodedMask):
                change = weights.read(name).masked_fill_(decode(change).logical_not_(), 0)
            with (folder / file).open("r+b") as stream:
                stream.seek(entry.begin)
                stream.write(as_bytes(change).numpy().data)


def file_names(ticket: Ticket, weights: WeightFolder) -> dict[str, str]:
    """Return the name in a folder's files for each tensor of a ticket; those without one are left out.

    The network of the folder may have a head that the ticket's has not, or the other way round: names then
    have the head's prefix or lack it. A tied tensor is in the files under one of its names only: the others
    are found by their hash.
    """
    wanted = ticket.names
    prefixes = {f"{name.partition('.')[0]}." for name in weights.places if "." in name}
    own = {f"{name.partition('.')[0]}." for name in wanted if "." in name}
    found: dict[str, str] = {}
    for add, drop in (
        ("", ""),
        *(("", drop) for drop in sorted(own)),
        *((add, "") for add in sorted(prefixes)),
    ):
        names = {name: add + name.removeprefix(drop) for name in wanted}
        held = {name: file_name for name, file_name in names.items() if file_name in weights.places}
        if len(held) > len(found) and len(set(held.values())) == len(held):
            found = held
    tied: dict[bytes, list[str]] = {}
    for name in found.keys() & ticket.base.keys():
        tied.setdefault(ticket.base[name], []).append(found[name])
    masked = set(ticket.masked)
    for name, digest in ticket.base.items():
        twins = sorted(tied.get(digest, ()))
        if name not in found and twins and (name not in masked or len(twins) == 1):
            found[name] = twins[0]
    return found


def _prefix_of_base(names: Mapping[str, str]) -> str:
    """Return the prefix that the names in the files have and the ticket's have not."""
    added = {file[: -len(name)] for name, file in names.items() if file != name and file.endswith(name)}
    return added.pop() if len(added) == 1 else ""


def _changes(ticket: Ticket, names: Mapping[str, str]) -> dict[str, Tensor | CodedMask]:
    """Return what is written, by names in the files: masks and norm statistics.

    Raises
    ------
    MaskError
        If two masks of one tensor differ.
    """
    whole = {**ticket.statistics, **ticket.tuned}
    changes: dict[str, Tensor | CodedMask] = {names[k]: values for k, values in whole.items()}
    first: dict[str, tuple[str, CodedMask]] = {}
    for name, target, mask in named(ticket.coded):
        if not is_parameter(target):
            continue
        other, before = first.setdefault(names[name], (name, mask))
        if before != mask and not torch.equal(decode(before), decode(mask)):
            raise two_masks(other, name)
        values = changes.get(names[name])
        if isinstance(values, Tensor):  # a tuned parameter under a mask
            changes[names[name]] = values.masked_fill(decode(mask).logical_not_(), 0)
        else:
            changes[names[name]] = mask
    return changes
