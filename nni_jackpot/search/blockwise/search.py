"""Search a network block by block: memory of one block, no labels, no backward through the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_jackpot.errors import CheckpointError
from nni_jackpot.masking.activations.input_statistics import InputStatistics, InputWatcher
from nni_jackpot.masks import Masks, by_module
from nni_jackpot.modules.batches import inputs_of
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.runtime.resume import digest
from nni_jackpot.runtime.settings import between, one_of, option
from nni_jackpot.search.blockwise.blocks import Call, blocks_of, capture
from nni_jackpot.search.blockwise.mask_training import (
    MaskTraining,
    TrainedMasks,
    held_out_of,
    order_of,
    train_masks,
)
from nni_jackpot.search.blockwise.scores import ScoreTraining, masked_weights
from nni_jackpot.search.blockwise.start import STARTS, layers_of, start_masks
from nni_jackpot.search.blockwise.targets import Target, as_numbers, by_block, chosen_targets

AIMS = ("dense", "own")


@dataclass(frozen=True, kw_only=True)
class BlockSearch(MaskTraining):
    """Settings of the search of every block.

    Attributes
    ----------
    start
        The mask to start from: ``"swaps"``, ``"wanda"`` or ``"magnitude"``.
    steps, lr, momentum, checks, held_out, seed
        Of the training of one block's masks: see `nni_jackpot.search.blockwise.mask_training.MaskTraining`.
    aim
        What a block shall compute: ``"dense"``, the output of the dense network; or ``"own"``, the output of
        the dense block on the input that the sparse blocks before it give.
    skip_tokens
        First tokens of a sequence that do not count, such as those of massive activations in causal language
        models.

    Raises
    ------
    SettingError
        If a setting is out of range.
    """

    start: str = option("mask that the search of a block starts from", one_of(STARTS), "swaps")
    aim: str = option(
        "what a block shall compute: the dense network's output (dense), or the dense block's output on the "
        "input that the sparse blocks before give (own)",
        one_of(AIMS),
        "dense",
    )
    skip_tokens: int = option(
        "first tokens of a sequence that do not count, as those of massive activations", between(0, 10**6), 0
    )


@dataclass(frozen=True)
class BlockReport:
    """What the search of one block has brought.

    Attributes
    ----------
    block
        Name of the block.
    index, total
        Place of the block, from 1, and number of blocks.
    start_loss, loss
        Squared error on the held-out batches, relative to the square of the output that it shall compute: of
        the mask at the start, and of the mask found.
    seconds
        What the block took.
    """

    block: str
    index: int
    total: int
    start_loss: float
    loss: float
    seconds: float


OnBlock = Callable[[BlockReport, Mapping[str, Any]], None]


def search_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Mapping[str, Target] | None = None,
    *,
    sparse_pattern: str | None = None,
    sparse_ratio: float | None = None,
    blocks: Sequence[str] | None = None,
    settings: BlockSearch | None = None,
    state: Mapping[str, Any] | None = None,
    on_block: OnBlock | None = None,
) -> Masks:
    """Search the masks of a network block by block, without labels.

    The inputs of the first block are computed once. A block's scores are then trained until the masked block
    computes, from the outputs of the sparse blocks before it, what `BlockSearch.aim` says. The best mask on
    held-out batches is kept, so that no block ends with a greater error there than it started with. Weights
    do not change; the result is masks.

    Parameters
    ----------
    model
        The network; it is run in evaluation mode, and is given back in the mode it was in.
    batches
        Calibration data, held in memory; see `nni_jackpot.modules.batches.call_model`. A step of the search
        takes one batch.
    targets
        What is searched, by the names of parameters; None for the weights of all Linear, convolution and
        Conv1D layers within the blocks, at ``sparse_pattern`` or ``sparse_ratio`` (see `targets_of`).
    sparse_pattern, sparse_ratio
        Pattern ``"N:M"``, or share of zeros in every row.
    blocks
        Names of the blocks in the order in which the network runs them; None to find them (`blocks_of`).
    settings
        Settings of the search.
    state
        What ``on_block`` was given last, to continue from there; with the same model and batches, the masks
        are those of a search without a break.
    on_block
        Called after each block with a report, and with the state as plain data: numbers, strings, tensors.

    Returns
    -------
    Masks
        NNI's masks, as `nni_jackpot.apply_masks` takes them.

    Raises
    ------
    BlocksError
        If the blocks cannot be found, or do not follow each other; or if another part of the network holds
        a target's weight as well.
    SparseRatioError
        If not exactly one of targets, pattern and ratio is given.
    CheckpointError
        If the state belongs to another search.
    SearchDivergedError
        If a loss is NaN or infinite.

    Examples
    --------
    >>> batches = [tokenizer(texts, return_tensors="pt", padding=True) for texts in chunks]
    >>> masks = search_blocks(model, batches, sparse_pattern="2:4")
    >>> apply_masks(model, masks)
    """
    settings = settings or BlockSearch()
    names = list(blocks) if blocks is not None else blocks_of(model)
    targets = chosen_targets(model, names, targets, sparse_pattern, sparse_ratio)
    per_block = by_block(names, targets)
    batches = list(batches)
    depends_on = {}
    if state is not None or on_block is not None:
        depends_on = _fingerprint(model, batches, settings, targets)
    kept = {} if state is None else _restored(state, depends_on, targets)
    with restored_modes(model):
        model.eval()
        captured = capture(model, names, batches)
        dense = sparse = captured.hidden
        for i, name in enumerate(names):
            began = time.monotonic()
            task = _Task(
                model.get_submodule(name),
                per_block[i],
                captured.calls[i],
                [
                    _counted(tokens, settings.skip_tokens, hidden)
                    for tokens, hidden in zip(captured.tokens, captured.hidden, strict=True)
                ],
                settings,
                settings.seed + i,
            )
            captured.calls[i] = []
            goal = task.outputs(dense if settings.aim == "dense" else sparse, {})
            done = {p: kept[f"{name}.{p}"] for p in per_block[i] if f"{name}.{p}" in kept}
            if per_block[i] and not done:
                done, start_loss, loss = task.search(sparse, goal)
                kept |= {f"{name}.{p}": mask for p, mask in done.items()}
                if on_block is not None:
                    seconds = time.monotonic() - began
                    report = BlockReport(name, i + 1, len(names), start_loss, loss, seconds)
                    on_block(report, {**depends_on, "kept": dict(kept)})
            sparse = task.outputs(sparse, done)
            dense = goal
    return nni_masks(model, targets, kept)


@dataclass
class _Task:
    """The search of one block."""

    block: nn.Module
    targets: Mapping[str, Target]
    calls: list[Call]
    counted: list[Tensor | None]
    settings: BlockSearch
    seed: int

    @torch.no_grad()
    def outputs(self, hidden: Sequence[Tensor], kept: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of the block under masks for the inputs of all batches."""
        masked = masked_weights(self._weights(), self.targets, kept)
        return [call.run(self.block, h, masked) for call, h in zip(self.calls, hidden, strict=True)]

    def search(self, inputs: Sequence[Tensor], goal: Sequence[Tensor]) -> TrainedMasks:
        """Return the best masks for inputs of the block, and outputs that it shall give."""
        settings = self.settings
        trained, held_out = held_out_of(len(inputs), settings.held_out)
        statistics = {} if settings.start == "magnitude" else self._statistics(inputs, trained)
        kept, scores = start_masks(self.block, self.targets, settings.start, statistics)

        def errors(i: int, masked: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            return _error(self.calls[i].run(self.block, inputs[i], masked), goal[i], self.counted[i])

        def held_out_loss(masked: Mapping[str, Tensor]) -> float:
            found = [errors(i, masked) for i in held_out]
            error, scale = (sum(part.item() for part in parts) for parts in zip(*found, strict=True))
            return error / scale if scale else error

        return train_masks(
            ScoreTraining(
                self._weights(), self.targets, kept, scores, settings.lr, settings.momentum, settings.steps
            ),
            order_of(trained, settings.steps, self.seed),
            settings.checks,
            lambda i, masked: errors(i, masked)[0],
            held_out_loss,
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.block.get_parameter(name) for name in self.targets}

    @torch.no_grad()
    def _statistics(self, inputs: Sequence[Tensor], which: Sequence[int]) -> dict[str, InputStatistics]:
        layers = layers_of(self.block, self.targets)
        with InputWatcher(layers, gram=self.settings.start == "swaps") as watcher:
            for i in which:
                watcher.tokens = self.counted[i]
                self.calls[i].run(self.block, inputs[i])
        return watcher.statistics


def _error(output: Tensor, goal: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of squared errors over the tokens that count, and that of squares of the goal."""
    if counted is not None and output.shape[: counted.dim()] == counted.shape:
        output, goal = output[counted], goal[counted]
    return (output - goal).float().square().sum(), goal.float().square().sum()


def _counted(tokens: Tensor | None, skip: int, hidden: Tensor) -> Tensor | None:
    """Return the tokens that count, the first ones of every sequence left out."""
    if not skip:
        return tokens
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool) if tokens is None else tokens.clone()
    counted[:, :skip] = False
    return counted.to(hidden.device)


def _fingerprint(
    model: nn.Module, batches: Sequence[Any], settings: BlockSearch, targets: Mapping[str, Target]
) -> dict[str, Any]:
    """Return what the masks of a search depend on, as plain data."""
    leaves = (x for batch in batches for x in tree_leaves(inputs_of(model, batch)) if isinstance(x, Tensor))
    return {
        "settings": asdict(settings),
        "targets": {name: [list(t.grains.shape), t.grains.rows, t.keep] for name, t in targets.items()},
        "weights": digest(model.get_parameter(name) for name in targets),
        "batches": digest(part for x in leaves for part in (torch.tensor(x.shape), x)),
    }


def _restored(
    state: Mapping[str, Any], expected: Mapping[str, Any], targets: Mapping[str, Target]
) -> dict[str, Tensor]:
    """Return the masks of a state, if it is one of this search."""
    for part, value in expected.items():
        if state.get(part) != value:
            are_digests = isinstance(value, str)
            differ = "others, or in another order" if are_digests else f"{state.get(part)}, not {value}"
            raise CheckpointError(f"the state belongs to another search: its {part} are {differ}")
    kept = dict(state["kept"])
    for name, mask in kept.items():
        shape = targets[name].grains.score_shape
        if mask.shape != shape or not torch.equal(targets[name].select(mask.float()), mask):
            raise CheckpointError(f"the state's mask of {name} does not keep {targets[name].keep} grains")
    return kept


def nni_masks(model: nn.Module, targets: Mapping[str, Target], kept: Mapping[str, Tensor]) -> Masks:
    """Return masks of grains, by the names of parameters, as NNI's."""
    return by_module(
        {name: as_numbers(t, kept[name], model.get_parameter(name)).clone() for name, t in targets.items()}
    )
