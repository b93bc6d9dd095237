"""The commands about tickets: ``nni-jackpot export RUN``, ``inspect TICKET``, ``apply TICKET CHECKPOINT``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from nni_jackpot.errors import CheckpointError
from nni_jackpot.experiment.config import RunConfig, load_config, to_dict
from nni_jackpot.experiment.data.section import seen_by
from nni_jackpot.experiment.folder.pretrained import pretrained_weights
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.experiment.models.checkpoints import read_checkpoint
from nni_jackpot.experiment.report.wording import table_of
from nni_jackpot.masks import Masks, load_masks
from nni_jackpot.modules.tuned import may_be_tuned
from nni_jackpot.runtime.files import replace_file
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.base_folder import BaseFolder
from nni_jackpot.storage.formats.coded_mask import CodedMask
from nni_jackpot.storage.norm_statistics import statistics_of
from nni_jackpot.storage.sparse_checkpoint import save_sparse
from nni_jackpot.storage.ticket import load_ticket, masks_by_name, save_ticket
from nni_jackpot.storage.ticket_format import named

_MOST_ROWS = 16
_SAFETENSORS = ".safetensors"


def export(options: argparse.Namespace) -> None:
    """Write the ticket, or the sparse checkpoint, of a run's folder."""
    run: Path = options.run
    config = load_config(run / "config.yml", is_stored=True)
    load_result(run).check_files("masks.pth", "jackpot.pth")
    masks = load_masks(run / "masks.pth")
    found = _read_state(run / "jackpot.pth")
    if options.sparse:
        path = options.output or run / "jackpot.sparse"
        save_sparse(path, found, masks)
    else:
        path = options.output or run / "jackpot.ticket"
        tuned = [name for name in found if may_be_tuned(name, found[name])]
        tuned = tuned if config.search.norm == "tune" else []
        save_ticket(path, masks, _dense(config, masks, found, run, tuned), _told(config, run), tuned)
    print(f"{path}: {path.stat().st_size:,} bytes")


def _dense(
    config: RunConfig, masks: Masks, found: dict[str, Tensor], run: Path, tuned: Collection[str]
) -> dict[str, Tensor]:
    """Return the found network before its weights were pruned."""
    base = _escaped(pretrained_weights, config, found)
    zeros = {name: mask.logical_not() for name, mask in masks_by_name(masks, base).items()}
    adapted = {name: found[name] for name in (*statistics_of(base), *tuned) if name in found}
    dense = base | adapted
    for name, tensor in dense.items():
        sparse = tensor.masked_fill(zeros[name], 0) if name in zeros else tensor
        if name not in found or not torch.equal(sparse, found[name]):
            raise CheckpointError(
                f"the pre-trained network is not what the jackpot of {run} was found in: {escaped(name)} "
                "differs"
            )
    return dense


def _told(config: RunConfig, run: Path) -> dict[str, Any]:
    """Return the metadata of a run, without information about the machine."""
    settings, result = to_dict(config), load_result(run)
    return {
        "data": config.data.name,
        "preprocessing": {key: settings["data"][key] for key in seen_by(config.data)},
        **{name: settings[name] for name in ("model", "config_list", "preset", "sparsity", "seed", "search")},
        "metrics": {row.kind: row.main for row in result.rows},
        "overlap": result.overlap,
    }


def inspect(options: argparse.Namespace) -> None:
    """Print the content of a ticket."""
    ticket = load_ticket(options.ticket)
    masks = [(name, mask) for name, _, mask in named(ticket.coded) if mask.kept < mask.size]
    table = table_of(["target", "shape", "sparsity %", "bits a weight", "entropy", "coded by"])
    table.align["coded by"] = "l"
    largest = sorted(masks, key=lambda item: -item[1].size)[:_MOST_ROWS]
    for name, mask in masks:
        if (name, mask) in largest:
            table.add_row([escaped(name), "x".join(map(str, mask.shape)), *_density(mask), _form(mask)])
    print(table)
    if len(masks) > len(largest):
        print(f"and {len(masks) - len(largest)} smaller targets")
    size, weights = options.ticket.stat().st_size, sum(mask.size for _, mask in masks)
    parts = {"masks": 0, **ticket.nbytes}
    parts["names and metadata"] = size - sum(parts.values())
    bound = sum(mask.bound for _, mask in masks)
    print(f"sparsity: {100 * ticket.sparsity:.2f} % of {weights:,} weights")
    print(f"size: {size:,} bytes: " + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
    if bound:
        print(f"masks: {parts['masks'] / bound:.4f} of the entropy of independent zeros, {bound:,.0f} bytes")
    print(f"base: {len(ticket.base)} tensors")
    if ticket.tuned:
        print(f"tuned: {len(ticket.tuned)} affines of norm layers and biases")
    for key, value in ticket.metadata.items():
        # In ASCII, where JSON escapes all control characters except one.
        print(f"{escaped(key)}: {json.dumps(value)}".replace("\x7f", "\\x7f"))


def _density(mask: CodedMask) -> list[str]:
    numbers = 100 * (1 - mask.kept / mask.size), 8 * len(mask.stream) / mask.size, 8 * mask.bound / mask.size
    return [f"{numbers[0]:.2f}", f"{numbers[1]:.3f}", f"{numbers[2]:.3f}"]


def _form(mask: CodedMask) -> str:
    if mask.group is not None:
        return f"{mask.group[0]}:{mask.group[1]}"
    return "weight" if max(mask.blocks, default=1) == 1 else "blocks of " + "x".join(map(str, mask.blocks))


def apply(options: argparse.Namespace) -> None:
    """Write the sparse network of a ticket and its base."""
    ticket = load_ticket(options.ticket)
    if options.checkpoint.is_dir():
        BaseFolder(options.checkpoint).apply(ticket, options.output)
    else:
        state = _read_state(options.checkpoint, ticket.names)
        ticket.apply(state)
        _write_state(state, options.output)
    print(f"{options.output}: {100 * ticket.sparsity:.2f} % of the weights of its pruned targets are zero")


def _read_state(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    return _escaped(read_checkpoint, path, names)


def _escaped(read: Callable[..., dict[str, Tensor]], *place: Any) -> dict[str, Tensor]:
    try:
        return read(*place)
    except CheckpointError as error:
        raise CheckpointError(escaped(error, most=1000)) from None


def _write_state(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == _SAFETENSORS:
        # Copies: tied weights share memory, and the format has one layout.
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        try:
            raw = save(own)
        except (SafetensorError, LookupError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be safetensors: {escaped(error)}") from None
        replace_file(path, lambda aside: aside.write_bytes(raw))
    else:
        replace_file(path, lambda aside: torch.save(state, aside))
