"""One run: a config in; a pre-trained network, its jackpot and a comparison out."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD

from nni_jackpot.errors import TrainingDivergedError
from nni_jackpot.experiment.checks import check_frozen, device_of, pruner_options, validate_config_list
from nni_jackpot.experiment.comparators import Comparator
from nni_jackpot.experiment.comparators.masked_training import all_kept
from nni_jackpot.experiment.config import RunConfig, settings_of, to_dict
from nni_jackpot.experiment.data.images import Batch
from nni_jackpot.experiment.data.loading import Data, load_data
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.folder.pretrained import (
    check_pretrained,
    check_start,
    ensure_pretrained,
    interrupted_training,
)
from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.folder.run_folder import (
    JACKPOT,
    MASKS,
    SEARCH,
    START,
    RunFolder,
    check_free,
    checkpoint_of,
    claimed,
    finished_run,
    phase_of,
    place_of,
)
from nni_jackpot.experiment.models import build_model, validate_model
from nni_jackpot.experiment.processes import averaged
from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.experiment.sight import tell_search, tell_start
from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.experiment.train import accuracy, cross_entropy_step, fit, train_weights
from nni_jackpot.masks import Masks, apply_masks, densities, mask_overlap, save_masks, sparsity_of
from nni_jackpot.modules.batch_norm import preserve_stats, reestimate
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.runtime.distributed import barrier, broadcast_result, rank
from nni_jackpot.runtime.files import check_folder, replace_file, save_tensors
from nni_jackpot.runtime.resume import check_state, digest, same_random_states


class RunContext:
    """Device, data and network of a run, made from its config; nothing is written.

    Attributes
    ----------
    run
        The folder that `open` was given.

    Raises
    ------
    JackpotError
        One of its kinds for a folder, a data set, weights or a config list that is not valid.
    """

    run: RunFolder

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = device_of(config.device)
        # The fastest convolutions add up gradients in an order that varies; the same seed must give the same
        # mask.
        torch.backends.cudnn.deterministic = True
        check_folder(place_of(config))
        self.data: Data = load_data(config.data, config.seed)
        torch.manual_seed(config.seed)
        check_start(config, self.data.num_classes)
        self.model: nn.Module = build_model(config.model, self.data.num_classes, self.data.shape[0])
        validate_model(config.model, self.model, self.data.num_classes, self.data.shape)
        tried = copy.deepcopy(self.model)
        validate_config_list(config, tried, is_pretrained=check_pretrained(tried, config))
        self.model.to(self.device)

    @property
    def steps(self) -> int:
        """Steps of the search."""
        return self.config.search.epochs * len(self.data.train)

    def open(self, run: RunFolder) -> None:
        """Begin to write to a run's folder, unless the run is finished; check what it would resume from.

        Raises
        ------
        CheckpointError
            If a file to resume from is damaged or belongs to other settings; the folder is then unchanged.
        """
        self.run = run
        if run.finished is not None:
            return
        config = self.config
        length = {"max_steps": self.steps, "max_epochs": config.search.epochs}
        check_state(run.work / SEARCH, "search", {**self.what_a_search_depends_on(), **length})
        if (run.work / SEARCH).exists() or not self.steps:  # else they belong to another search
            for name, comparator in config.compared.items():
                known = self._what_a_training_depends_on(comparator)
                check_state(run.work / checkpoint_of(name), "training", known)
        if (file := interrupted_training(config)) is not None:
            check_state(file, "training", self._what_a_training_depends_on(config.pretrain))
        barrier()  # all processes have checked the files before the first one changes them
        run.begin(config)

    def evaluate(self, model: nn.Module) -> float:
        """Return the accuracy of a model on the test images."""
        return accuracy(model, self.data.test, self.device)

    def pretrain(self) -> Path:
        """Load the pre-trained weights into the model; train them first if they are not cached."""
        tell_start(self.config, self.device, self.data, self.model)

        def train(interrupted: Path) -> None:
            self.train(self.model, self.config.pretrain, "pretrain", interrupted)

        path = ensure_pretrained(self.model, self.config, train)
        # What follows must not depend on whether the weights were trained just now.
        torch.manual_seed(self.config.seed)
        self.data.restart()
        return path

    def train(
        self, model: nn.Module, config: TrainConfig, name: str, interrupted: Path, masks: Masks | None = None
    ) -> Masks:
        """Train weights, tracked under the name of the phase; resume from a file if it exists."""
        loader = self.data.train
        found = [mask for of_module in (masks or {}).values() for mask in of_module.values()]
        depends_on = {
            **self._what_a_training_depends_on(config),
            "weights": digest(model.state_dict().values()),
            "masks": digest(mask for mask in found if mask is not None),
        }
        file = EpochFile(interrupted, depends_on)
        if not interrupted.exists():
            self.run.delete_stale_logs(name)
        steps = config.epochs * len(loader)
        with Tracker(
            self.run.work / name, steps, description=name, rank=rank(), report_to_nni=False
        ) as tracker:
            return train_weights(
                model,
                config,
                loader,
                file,
                on_step=tracker.step,
                on_epoch=lambda: tracker.epoch(self.evaluate(model)),
                on_skip=lambda epochs: tracker.skip_epochs(epochs, len(loader)),
                masks=masks,
            )

    def _what_a_training_depends_on(self, config: TrainConfig) -> dict[str, Any]:
        own = to_dict(config, ["weights"])
        settings = settings_of(self.config, ["weights"]).items()
        shared = {name: value for name, value in settings if name.startswith(("seed", "data.", "model."))}
        return {**shared, **own, "device": self.device.type}

    def what_a_search_depends_on(self) -> dict[str, Any]:
        """Return the settings that the masks of the search depend on, by dotted name."""
        others = "pretrain.", "finetune.", "comparators."
        settings = settings_of(self.config).items()
        own = {name: value for name, value in settings if not name.startswith(others)}
        return {**own, "device": self.device.type}


def pretrain(config: RunConfig, overwrite: bool = False) -> tuple[Path, float]:
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
    model, steps = context.model, context.steps
    dense = copy.deepcopy(model.state_dict())
    rows = [Row("dense", context.evaluate(model), 0.0, 0)]

    if not (run.work / SEARCH).exists():
        run.delete_stale_logs("")
        if steps:
            run.delete_stale_comparators()
    with Tracker(run.work, steps, description="search", rank=rank()) as tracker:
        loop = _SearchLoop(context, tracker)
        pruner, start = loop.start()
        tell_search(rows[0].accuracy, start)
        sparsity = sparsity_of(start)
        rows.append(Row("initial", context.evaluate(model), sparsity, 0))
        rows.append(Row("initial_norm", _with_norm_reestimated(context), sparsity, 0))
        began = time.perf_counter()
        masks = start
        if steps:
            _, masks = pruner.compress(max_steps=steps, max_epochs=config.search.epochs)
        seconds = time.perf_counter() - began
        if config.search.reestimate_norm and steps:
            context.data.restart()
            pruner.reestimate_norm(context.data.train)
        rows.append(Row("jackpot", context.evaluate(model), sparsity, config.search.epochs))
        tracker.final(rows[-1].accuracy)
    pruner.unwrap_model()
    check_frozen(model, dense)

    found = copy.deepcopy(model.state_dict())  # with its normalisation statistics
    for name, comparator in config.compared.items():
        state, under = (found, masks) if comparator.start == "jackpot" else (dense, start)
        rows.append(_compare(context, name, comparator, state, under))
    apply_masks(model, masks)
    result = Result(rows, mask_overlap(start, masks).total, seconds, run.folder, pruner.resumed_step)
    if rank() == 0:
        save_masks(start, run.work / START)
        save_masks(masks, run.work / MASKS)
        replace_file(run.work / JACKPOT, lambda aside: save_tensors(model.state_dict(), aside))
        result = run.finish(result, config)
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

    def start(self) -> tuple[LotteryJackpotPruner, Masks]:
        """Wrap the model; return the pruner and the initial masks."""
        context, options = self._context, self._context.config.search
        # NNI drives every search by the user's optimizer; this one gets no gradient: all weights are frozen.
        optimizer = nni.trace(SGD)(context.model.parameters(), lr=0.1)
        pruner = LotteryJackpotPruner(
            context.model,
            list(context.config.config_list),
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

    def _train(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        loader = self._context.data.train
        loader.pass_over(self._pruner.resumed_step if self._pruner else 0)
        # Criteria average over all processes themselves.
        model = averaged(model) if self._pruner else model
        fit(model, *args, **kwargs, loader=loader, on_step=self._on_step, on_epoch=self._on_epoch)

    def _training_step(self, batch: Batch, model: nn.Module) -> Tensor:
        loss = cross_entropy_step(batch, model)
        # Steps before the resumed one only draw their random numbers.
        if self._pruner and self._steps >= self._pruner.resumed_step:
            self._tracker.note(loss)
        return loss

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
        overlap = mask_overlap(self._start, masks).total
        # Repeated for a process that resumes at the end of an epoch, and takes no step of it.
        last = {"learning_rate": pruner.learning_rate, "flips": pruner.flips}
        self._tracker.epoch(self._accuracy(pruner), **last, overlap=overlap, layers=densities(masks))

    def _accuracy(self, pruner: LotteryJackpotPruner) -> float:
        """Return what the accuracy would be if the search ended here."""
        context = self._context
        if not context.config.search.reestimate_norm:
            return context.evaluate(context.model)
        with same_random_states(), preserve_stats(context.model):  # the search continues unchanged
            pruner.reestimate_norm(context.data.sample)
            return context.evaluate(context.model)


def _with_norm_reestimated(context: RunContext) -> float:
    """Return the accuracy under the initial masks with normalisation statistics re-estimated for them."""
    with preserve_stats(context.model):
        reestimate(context.model, context.data.train)
        context.data.restart()
        return context.evaluate(context.model)


def _compare(
    context: RunContext, name: str, comparator: Comparator, state: dict[str, Tensor], masks: Masks
) -> Row:
    """Train weights as a comparator does, from a state dict and masks; return its row."""
    config, data = context.config, context.data
    data.restart()
    model = copy.deepcopy(context.model)
    model.load_state_dict(state)
    if comparator.from_scratch:
        with same_random_states():
            torch.manual_seed(config.seed)
            drawn = build_model(replace(config.model, weights=None), data.num_classes, data.shape[0])
        model.load_state_dict(drawn.state_dict())
    if comparator.start == "dense":
        masks = all_kept(masks)
    try:
        file = context.run.work / checkpoint_of(name)
        masks = context.train(model, comparator, phase_of(name), file, masks)
    except TrainingDivergedError:
        # The remedy is another lr, for all comparators with these settings.
        same = [other for other, own in config.compared.items() if own.lr == comparator.lr]
        context.run.delete_stale(*map(checkpoint_of, same))
        raise
    before = config.search.epochs if comparator.start == "jackpot" else 0
    return Row(name, context.evaluate(model), sparsity_of(masks), before + comparator.epochs)
