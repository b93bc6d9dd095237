"""A run whose masks are searched block by block; the network is never changed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from nni_jackpot.experiment.comparators.one_shot import OneShot
from nni_jackpot.experiment.folder.result import Row, Spent
from nni_jackpot.experiment.folder.run_folder import SEARCH
from nni_jackpot.experiment.running.context import RunContext
from nni_jackpot.experiment.running.targets import targets_in
from nni_jackpot.experiment.sight import tell_dense, tell_search
from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.masks import Masks, apply_masks, sparsity_of
from nni_jackpot.runtime.distributed import rank
from nni_jackpot.runtime.resume import digest, read_state, write_state
from nni_jackpot.search.blockwise import BlockReport, Target, blocks_of, search_blocks
from nni_jackpot.search.blockwise.polish import polish
from nni_jackpot.search.match_dense import MATCHING_LOSSES

# The mask that searches are compared with, which takes no training.
START = "wanda"


@dataclass(frozen=True)
class BlockwiseResult:
    """Masks found block by block.

    Attributes
    ----------
    rows
        Dense network, initial masks, comparators without training, and the jackpot.
    start, masks
        Initial masks and found masks.
    seconds
        Time of the search.
    resumed_step
        Number of blocks that an interrupted process had searched.
    """

    rows: list[Row]
    start: Masks
    masks: Masks
    seconds: float
    resumed_step: int


def search_blockwise(context: RunContext) -> BlockwiseResult:
    """Search the masks of a run block by block, and measure them beside those of comparators.

    Raises
    ------
    JackpotError
        One of its kinds, as `nni_jackpot.search.blockwise.search_blocks` and ``polish`` raise them.
    """
    config, model = context.config, context.model.eval()
    before = digest(model.state_dict().values())
    context.data.restart()
    batches = [_moved(batch, context.device) for batch in context.data.train]
    tokens = _tokens(batches)
    targets = targets_in(config, model)
    rows = [context.row("dense", model, 0.0)]
    tell_dense(config, context.data, rows[0])
    own = config.search.blockwise
    assert own is not None  # else the run searches the network as a whole
    with _measured(context, tokens) as spent:
        plain = replace(own, steps=0, start=START)
        start = search_blocks(model, batches, targets, settings=plain)
    sparsity = sparsity_of(start)
    tell_search(start)
    rows.append(_masked_row(context, "initial", start, spent))
    for name, comparator in config.compared.items():
        if isinstance(comparator, OneShot):
            with _measured(context, tokens) as spent:
                pruned = comparator.prune(copy.deepcopy(model), batches, targets)
            rows.append(context.row(name, pruned, sparsity, 0, spent[0]))
            del pruned
    with _measured(context, tokens) as spent:
        masks, resumed = _search(context, batches, targets)
        if config.search.polish is not None:
            loss = MATCHING_LOSSES.find(config.search.loss)
            masks = polish(
                model, batches, masks, loss, targets, settings=config.search.polish, on_check=_tell_check
            )
    rows.append(_masked_row(context, "jackpot", masks, spent))
    assert digest(model.state_dict().values()) == before
    return BlockwiseResult(rows, start, masks, spent[0].seconds, resumed)


def _search(context: RunContext, batches: list[Any], targets: Mapping[str, Target]) -> tuple[Masks, int]:
    """Search all blocks; continue after the last block of an interrupted process."""
    config, file = context.config, context.run.work / SEARCH
    # Equal to what `RunContext.open` checks.
    depends_on = {**context.what_a_search_depends_on(), "max_steps": context.steps}
    depends_on["max_epochs"] = config.search.epochs
    state = read_state(file, "search", depends_on)["search"] if file.exists() else None
    blocks = blocks_of(context.model)
    done = 0 if state is None else len({_block_of(name, blocks) for name in state["kept"]})
    with Tracker(
        context.run.work,
        len(blocks),
        description="search",
        log_every=1,
        rank=rank(),
        measure=context.measure,
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


def _block_of(name: str, blocks: list[str]) -> str:
    return next(block for block in blocks if name.startswith(f"{block}."))


def _masked_row(context: RunContext, kind: str, masks: Masks, spent: list[Spent]) -> Row:
    sparse = apply_masks(copy.deepcopy(context.model), masks)
    return context.row(kind, sparse, sparsity_of(masks), 0, spent[0])


@contextmanager
def _measured(context: RunContext, tokens: int) -> Iterator[list[Spent]]:
    """Yield a list that gets what the block took."""
    spent: list[Spent] = []
    began = time.perf_counter()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    yield spent
    seconds = time.perf_counter() - began
    spent.append(Spent(tokens, seconds, _peak_gib(context.device)))


def _peak_gib(device: torch.device) -> float:
    """Return the peak memory of a GPU since its last reset, or of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: values.to(device) for name, values in batch.items()}
    return tuple(values.to(device) for values in batch)


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
