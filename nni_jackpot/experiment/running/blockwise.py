"""A run whose masks are searched block by block; the network is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nni_jackpot.experiment.comparators.one_shot import OneShot
from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.folder.run_folder import SEARCH
from nni_jackpot.experiment.running.context import RunContext
from nni_jackpot.experiment.running.cost import Cost, changes_weights, measured, with_overlap
from nni_jackpot.experiment.running.targets import targets_in
from nni_jackpot.experiment.sight import tell_dense, tell_search
from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.masks import Masks, apply_masks, mask_overlap, sparsity_of
from nni_jackpot.modules.batches import moved
from nni_jackpot.runtime.distributed import rank
from nni_jackpot.runtime.resume import digest, read_state, write_state
from nni_jackpot.search.blockwise import BlockReport, Target, blocks_of, search_blocks
from nni_jackpot.search.blockwise.polish import polish
from nni_jackpot.search.match_dense import MATCHING_LOSSES, MatchDense

# The mask that searches are compared with, which takes no training.
START = "wanda"


def search_blockwise(context: RunContext) -> tuple[Result, Masks, Masks]:
    """Search the masks of a run block by block, and measure them beside those of comparators.

    Returns
    -------
    result : Result
        Rows of the dense network, the initial masks, comparators without training, and the jackpot; resumed
        at a number of blocks.
    start, masks : Masks
        Initial masks and found masks.

    Raises
    ------
    JackpotError
        One of its kinds, as `nni_jackpot.search.blockwise.search_blocks` and ``polish`` raise them.
    """
    config, model = context.config, context.model.eval()
    before = digest(model.state_dict().values())
    context.data.restart()
    batches = [moved(batch, context.device) for batch in context.data.train]
    tokens = _tokens(batches)
    own_loss = config.search.loss
    loss = context.task.loss if own_loss == "labels" else MatchDense(model, own_loss)
    with measured(context.device, tokens) as chosen:
        targets = targets_in(config, model, batches, loss)
    rows = [context.row("dense", model, 0.0)]
    tell_dense(config, context.data, rows[0])
    own = config.search.blockwise
    assert own is not None  # else the run searches the network as a whole
    with measured(context.device, tokens) as cost:
        plain = replace(own, steps=0, start=START)
        start = _converted(search_blocks(model, batches, targets, settings=plain), torch.bool)
    sparsity = sparsity_of(start)
    tell_search(start)
    rows.append(_masked_row(context, "initial", start, chosen + cost))
    masks_of = {"initial": start}
    for name, comparator in config.compared.items():
        if isinstance(comparator, OneShot):
            with measured(context.device, tokens) as cost:
                pruned = comparator.prune(copy.deepcopy(model), batches, targets)
            masks_of[name] = _zeros_of(pruned, start)
            is_changed = changes_weights(pruned, model.state_dict(), masks_of[name])
            rows.append(
                replace(context.row(name, pruned, sparsity, 0, chosen + cost), weights_changed=is_changed)
            )
            del pruned
    with measured(context.device, tokens) as cost:
        masks, resumed = _search(context, batches, targets)
        if config.search.polish is not None:
            matching = MATCHING_LOSSES.find(own_loss)
            masks = polish(
                model, batches, masks, matching, targets, settings=config.search.polish, on_check=_tell_check
            )
    jackpot = _masked_row(context, "jackpot", masks, chosen + cost)
    rows.append(replace(jackpot, seconds=None) if resumed else jackpot)
    masks_of["jackpot"] = masks
    assert digest(model.state_dict().values()) == before
    rows = [with_overlap(row, masks_of.get(row.kind), masks) for row in rows]
    overlap = mask_overlap(start, masks).total
    result = Result(rows, overlap, cost.seconds or 0.0, context.run.folder, resumed)
    return result, _converted(start, next(model.parameters()).dtype), masks


def _search(context: RunContext, batches: list[Any], targets: Mapping[str, Target]) -> tuple[Masks, int]:
    """Search all blocks; continue after the last block of an interrupted process."""
    config, file = context.config, context.run.work / SEARCH
    # Equal to what `RunContext.open` checks.
    depends_on = context.what_a_search_depends_on()
    state = read_state(file, "search", depends_on)["search"] if file.exists() else None
    blocks = blocks_of(context.model)
    found = () if state is None else state["kept"]
    done = sum(any(name.startswith(f"{block}.") for name in found) for block in blocks)
    with Tracker(
        context.run.work,
        len(blocks),
        description="search",
        log_every=1,
        rank=rank(),
        measure=context.measure,
        services=context.services(),
    ) as tracker:
        for _ in range(done):
            tracker.skip_step()

        def on_block(report: BlockReport, state: Mapping[str, Any]) -> None:
            tracker.step(report.loss, start_loss=report.start_loss)
            tracker.line()
            write_state(file, depends_on, {"search": state})

        masks = search_blocks(
            context.model,
            batches,
            targets,
            blocks=blocks,
            settings=config.search.blockwise,
            state=state,
            on_block=on_block,
        )
    return masks, done


def _masked_row(context: RunContext, kind: str, masks: Masks, cost: Cost) -> Row:
    sparse = apply_masks(copy.deepcopy(context.model), masks)
    return context.row(kind, sparse, sparsity_of(masks), 0, cost)


def _converted(masks: Masks, dtype: torch.dtype) -> Masks:
    """Return masks in another type; those that wait for a later row take a byte a weight."""
    return {
        module: {name: None if mask is None else mask.to(dtype) for name, mask in targets.items()}
        for module, targets in masks.items()
    }


def _zeros_of(pruned: nn.Module, like: Masks) -> Masks:
    """Return the masks of a pruned network, for the targets of other masks."""
    return {
        module: {
            name: None if mask is None else (getattr(pruned.get_submodule(module), name) != 0).to(mask)
            for name, mask in targets.items()
        }
        for module, targets in like.items()
    }


def _tokens(batches: list[Any]) -> int:
    """Return the number of tokens that count, or of images."""
    if not isinstance(batches[0], Mapping):
        return sum(len(batch[0]) for batch in batches)
    return sum(
        int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches
    )


def _tell_check(step: int, loss: float) -> None:
    if rank() == 0:
        print(f"polish: step {step}, loss {loss:.4f}", flush=True)
