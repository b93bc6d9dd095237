"""One run: a config in; a pre-trained network, its jackpot and a comparison out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD

from nni_jackpot.experiment.checks import check_frozen, config_list_of, pruner_options
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.folder.run_folder import (
    JACKPOT,
    MASKS,
    SEARCH,
    START,
    RunFolder,
    check_free,
    claimed,
    finished_run,
)
from nni_jackpot.experiment.processes import averaged
from nni_jackpot.experiment.running.blockwise import search_blockwise
from nni_jackpot.experiment.running.compare import compare
from nni_jackpot.experiment.running.context import RunContext, is_text
from nni_jackpot.experiment.running.cost import measured, with_overlap
from nni_jackpot.experiment.sight import tell_dense, tell_search
from nni_jackpot.experiment.tracking import Tracker, report_final
from nni_jackpot.experiment.train import fit
from nni_jackpot.masks import (
    Masks,
    apply_masks,
    densities,
    mask_overlap,
    named_masks,
    save_masks,
    sparsity_of,
)
from nni_jackpot.modules.batch_norm import preserve_stats, reestimate
from nni_jackpot.modules.parameters import join
from nni_jackpot.nni_bridge.grouping import by_name
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.runtime.distributed import barrier, broadcast_result, rank
from nni_jackpot.runtime.files import replace_file, save_tensors
from nni_jackpot.runtime.resume import same_random_states
from nni_jackpot.search.match_dense import MatchDense


def pretrain(config: RunConfig, overwrite: bool = False) -> tuple[Path | None, float]:
    """Train the network of a config, unless it is cached; return the file and the accuracy.

    Parameters
    ----------
    config
        The run.
    overwrite
        Whether the search that follows will replace a finished run in the folder.

    Raises
    ------
    JackpotError
        As `search` does.
    """
    check_free(config, overwrite)
    context = RunContext(config)
    with claimed(config, overwrite) as run:
        context.open(run)
        path = context.pretrain()
        return path, context.evaluate(context.model)


def search(config: RunConfig, overwrite: bool = False) -> Result:
    """Find a jackpot in the pre-trained network, and write it to the run's folder.

    An interrupted run of the same config is resumed: the search from its last checkpoint, a training of
    weights from its last epoch. If the run is finished already, its results are returned.

    Parameters
    ----------
    config
        The run.
    overwrite
        Whether a finished run in the folder is replaced, at the end of this run.

    Raises
    ------
    JackpotError
        One of its kinds for an error in the config, the data, the checkpoint or the folder, before anything
        is written; and if the search diverges.
    """
    found = finished_run(config, overwrite)
    if found is None:
        context = RunContext(config)
        with claimed(config, overwrite) as run:
            if run.finished is None:
                return _search(context, run)
            found = run.finished  # by another process meanwhile
    if rank() == 0:
        said = "%s holds this run, finished: its results are used. --overwrite repeats the run"
        logging.getLogger(__name__).warning(said, found.folder)
    return found


def _search(context: RunContext, run: RunFolder) -> Result:
    config = context.config
    context.open(run)
    context.pretrain()
    if config.search.blockwise is not None:
        return _searched_blockwise(context, run)
    model, steps = context.model, context.steps
    dense = copy.deepcopy(model.state_dict())
    rows = [context.row("dense", model, 0.0)]
    tell_dense(config, context.data, rows[0])

    if not (run.work / SEARCH).exists():
        run.delete_stale_logs("")
        if steps:
            run.delete_stale_comparators()
    with Tracker(
        run.work,
        steps,
        description="search",
        rank=rank(),
        measure=context.measure,
        services=context.services(),
    ) as tracker:
        loop = _SearchLoop(context, tracker)
        with measured(context.device) as started:
            pruner, start = loop.start()
        tell_search(start)
        targets = loop.targets()
        sparsity = sparsity_of(start, targets)
        rows.append(context.row("initial", model, sparsity, cost=started))
        if not is_text(config):
            rows.append(_with_norm_reestimated(context, sparsity))
        masks = start
        with measured(context.device) as searched:
            if steps:
                _, masks = pruner.compress(
                    max_steps=steps,
                    max_epochs=config.search.epochs,
                    norm_batches=_first_epoch(context.data) if config.search.reestimate_norm else None,
                    held_out=loop.sample_loss,
                )
        until = started + (replace(searched, seconds=None) if pruner.resumed_step else searched)
        jackpot = context.row("jackpot", model, sparsity, config.search.epochs, until)
    rows = [row if row.kind == "dense" else with_overlap(row, start, masks) for row in rows]
    rows.append(with_overlap(jackpot, masks, masks))
    pruner.unwrap_model()
    check_frozen(model, dense, pruner.tuned)

    found = copy.deepcopy(model.state_dict())  # with its normalisation statistics
    for name, comparator in config.compared.items():
        begin = (found, masks, until) if comparator.start == "jackpot" else (dense, start, started)
        row, kept = compare(context, name, comparator, *begin, targets)
        rows.append(with_overlap(row, kept, masks))
    overlap = mask_overlap(start, masks).total
    result = Result(rows, overlap, searched.seconds or 0.0, run.folder, pruner.resumed_step)
    return _finished(context, run, result, start, masks)


def _searched_blockwise(context: RunContext, run: RunFolder) -> Result:
    if not (run.work / SEARCH).exists():
        run.delete_stale_logs("")
    return _finished(context, run, *search_blockwise(context))


def _finished(context: RunContext, run: RunFolder, result: Result, start: Masks, masks: Masks) -> Result:
    """Write the masks, the sparse network and the results, and report to NNI."""
    model, config = context.model, context.config
    apply_masks(model, masks)
    (jackpot,) = (row for row in result.rows if row.kind == "jackpot")
    if rank() == 0:
        save_masks(start, run.work / START)
        save_masks(masks, run.work / MASKS)
        replace_file(run.work / JACKPOT, lambda aside: save_tensors(model.state_dict(), aside))
        result = run.finish(result, config)
    report_final(jackpot.main, sparsity=jackpot.sparsity, overlap=result.overlap)
    barrier()
    return result


class _SearchLoop:
    """The training loop of a search, which feeds the tracker.

    Criteria that take gradients run the loop as well, before the search: it then tracks nothing.
    """

    def __init__(self, context: RunContext, tracker: Tracker) -> None:
        self._context, self._tracker = context, tracker
        self._pruner: LotteryJackpotPruner | None = None  # until the search begins
        self._start: Masks = {}
        self._steps = 0
        loss = context.config.search.loss
        self._loss = context.task.loss if loss == "labels" else MatchDense(context.model, loss)

    def start(self) -> tuple[LotteryJackpotPruner, Masks]:
        """Wrap the model; return the pruner and the initial masks."""
        context, options = self._context, self._context.config.search
        # NNI drives every search by the user's optimizer; this one gets no gradient: all weights are frozen.
        optimizer = nni.trace(SGD)(context.model.parameters(), lr=0.1)
        pruner = LotteryJackpotPruner(
            context.model,
            config_list_of(context.config, context.model),
            TorchEvaluator(self._train, optimizer, self._training_step),
            init=options.init,
            **pruner_options(options),
        )
        pruner.checkpoint_to(
            context.run.work / SEARCH,
            options.checkpoint_every,
            context.what_a_search_depends_on(),
            keep=True,  # until the comparators have run as well
            minutes=options.checkpoint_minutes,
            beside=self._tracker,
        )
        context.data.restart()
        self._pruner, self._start = pruner, pruner.get_masks()
        return pruner, self._start

    def targets(self) -> set[str]:
        """Return the names of what is pruned: what has scores, also without a zero, and what follows it."""
        assert self._pruner is not None
        scored = by_name(self._pruner._targets.groups, self._pruner._target_spaces)
        follows = {name for name, mask in named_masks(self._start).items() if not mask.all()}
        return {join(*name) for name in scored} | follows

    def _train(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        loader = self._context.data.train
        loader.pass_over(self._pruner.resumed_step if self._pruner else 0)
        # Criteria average over all processes themselves.
        model = averaged(model) if self._pruner else model
        fit(model, *args, **kwargs, loader=loader, on_step=self._on_step, on_epoch=self._on_epoch)

    def _training_step(self, batch: Any, model: nn.Module) -> Tensor:
        loss = self._loss(batch, model)
        # Steps before the resumed one only draw their random numbers.
        if self._pruner and self._steps >= self._pruner.resumed_step:
            self._tracker.note(loss)
        return loss

    def sample_loss(self) -> Tensor:
        """Return the loss of the first few training batches."""
        data, model = self._context.data.sample, self._context.model
        return torch.stack([self._loss(batch, model) for batch in data]).mean()

    def _on_step(self, loss: Tensor) -> None:
        if self._pruner is None:
            return
        self._steps += 1
        if self._steps <= self._pruner.resumed_step:
            self._tracker.skip_step()
        else:
            self._tracker.step(loss, learning_rate=self._pruner.learning_rate, flips=self._pruner.flips)

    def _on_epoch(self) -> None:
        if (pruner := self._pruner) is None:
            return
        # The last skipped step leaves the masks that it left before.
        is_known = self._steps == pruner.resumed_step and broadcast_result(self._tracker.has_next_epoch)
        if self._steps < pruner.resumed_step or is_known:
            self._tracker.skip_epoch()
            return
        masks = pruner.get_masks()
        found = {
            "sparsity": sparsity_of(masks, self.targets()),
            "overlap": mask_overlap(self._start, masks).total,
        }
        # Repeated for a process that resumes at the end of an epoch, and takes no step of it.
        last = {"learning_rate": pruner.learning_rate, "flips": pruner.flips}
        self._tracker.epoch(self._accuracy(pruner), **last, **found, layers=densities(masks))

    def _accuracy(self, pruner: LotteryJackpotPruner) -> float:
        """Return what the accuracy would be if the search ended here."""
        context = self._context
        if not context.config.search.reestimate_norm:
            return context.evaluate(context.model)
        with same_random_states(), preserve_stats(context.model):  # the search continues unchanged
            pruner.reestimate_norm(context.data.sample)
            return context.evaluate(context.model)


def _first_epoch(data: Any) -> Iterator[Any]:
    """Yield the batches of the first epoch; the search must be over before the first is asked for."""
    data.restart()
    yield from data.train


def _with_norm_reestimated(context: RunContext, sparsity: float) -> Row:
    """Return the row of the initial masks with normalisation statistics re-estimated for them."""
    with preserve_stats(context.model):
        reestimate(context.model, context.data.train)
        context.data.restart()
        return context.row("initial_norm", context.model, sparsity)
