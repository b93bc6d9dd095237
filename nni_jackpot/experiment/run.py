"""One run: a config in; a pre-trained network, its jackpot and a comparison out."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD

from nni_jackpot.errors import JackpotError, TrainingDivergedError
from nni_jackpot.experiment.checks import device_of, pruner_options, validate_config_list
from nni_jackpot.experiment.config import RunConfig, TrainConfig
from nni_jackpot.experiment.data.images import Batch
from nni_jackpot.experiment.data.loading import Data, load_data
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.folder.pretrained import (
    check_pretrained,
    check_start,
    ensure_pretrained,
    interrupted_training,
)
from nni_jackpot.experiment.folder.result import Result, Row, settings_of
from nni_jackpot.experiment.folder.run_folder import (
    JACKPOT,
    MASKS,
    SEARCH,
    START,
    TUNED,
    RunFolder,
    check_free,
    claimed,
    finished_run,
    place_of,
)
from nni_jackpot.experiment.models import build_model, validate_model
from nni_jackpot.experiment.processes import averaged
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
    """The parts that every command needs, made from a config with its seed; nothing is written.

    Attributes
    ----------
    run
        The folder that `open` has been given.

    Raises
    ------
    JackpotError
        One of its kinds for a folder, a dataset, weights or a config list that will not do.
    """

    run: RunFolder

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = device_of(config.device)
        # Else the fastest convolution may add up a gradient in another order every time: the same seed is to
        # give the same mask.
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
        """Begin to write to a run's folder, unless the run is finished; or go on with what was interrupted.

        Raises
        ------
        CheckpointError
            If that is damaged or of other settings; the folder is then as it was.
        """
        self.run = run
        if run.finished is not None:
            return
        config = self.config
        length = {"max_steps": self.steps, "max_epochs": config.search.epochs}
        check_state(run.work / SEARCH, "search", {**self.what_a_search_depends_on(), **length})
        if (run.work / SEARCH).exists() or not self.steps:  # else they are of another search
            for name in TUNED.values():
                check_state(run.work / name, "training", self._what_a_training_depends_on(config.finetune))
        if (file := interrupted_training(config)) is not None:
            check_state(file, "training", self._what_a_training_depends_on(config.pretrain))
        barrier()  # until they have looked: the first process is about to change what is there
        run.begin(config)

    def evaluate(self, model: nn.Module) -> float:
        """Return the accuracy of a model on the test images."""
        return accuracy(model, self.data.test, self.device)

    def pretrain(self) -> Path:
        """Give the model its pre-trained weights, trained now if they are not there yet."""
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
    ) -> None:
        """Train weights, tracked under the name of the phase; goes on from a file if it was interrupted."""
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

            def skip(epochs: int) -> None:
                for _ in range(epochs):
                    for _ in range(len(loader)):
                        tracker.skip_step()
                    tracker.skip_epoch()

            train_weights(
                model,
                config,
                loader,
                file,
                on_step=tracker.step,
                on_epoch=lambda: tracker.epoch(self.evaluate(model)),
                on_skip=skip,
                masks=masks,
            )

    def _what_a_training_depends_on(self, config: TrainConfig) -> dict[str, Any]:
        settings = settings_of(self.config).items()
        return {
            **{
                name: value
                for name, value in settings
                if name.startswith(("seed", "data.", "model.")) and name != "data.eval_batch_size"
            },
            **{field.name: getattr(config, field.name) for field in fields(TrainConfig)},
            "device": self.device.type,
        }

    def what_a_search_depends_on(self) -> dict[str, Any]:
        """Return the settings of the run by dotted name, but for those that leave its masks as they are."""
        settings = settings_of(self.config).items()
        others = {name: value for name, value in settings if not name.startswith(("pretrain.", "finetune."))}
        return {**others, "device": self.device.type}


def pretrain(config: RunConfig, overwrite: bool = False) -> tuple[Path, float]:
    """Train the network of a config, or find it trained; return its file and its accuracy.

    Parameters
    ----------
    config
        The run.
    overwrite
        Whether a search that is to follow will replace a finished run in the folder.

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

    What was interrupted there goes on, if the config is still the same: a search from its last checkpoint, a
    training of weights after its last epoch. If the run is finished there already, its results are taken.

    Parameters
    ----------
    config
        The run.
    overwrite
        Whether a finished run in the folder is replaced, at the end of this one.

    Raises
    ------
    JackpotError
        One of its kinds for what is wrong with the config, the data, the checkpoint or the folder, before
        anything is written; and if the search diverges.
    """
    found = finished_run(config, overwrite)
    if found is None:
        context = RunContext(config)
        with claimed(config, overwrite) as run:
            if run.finished is None:
                return _search(context, run)
            found = run.finished  # by another process meanwhile
    if rank() == 0:
        said = "%s holds this run, finished: its results are taken. --overwrite makes it anew"
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
            run.delete_stale(*TUNED.values())  # of another search
    with Tracker(run.work, steps, description="search", rank=rank()) as tracker:
        pruner, start = _make_pruner(context, tracker)
        tell_search(rows[0].accuracy, start)
        sparsity = sparsity_of(start)
        rows.append(Row("initial", context.evaluate(model), sparsity, 0))
        rows.append(Row("initial_norm", _with_norm_reestimated(context), sparsity, 0))
        began = time.perf_counter()
        masks = start
        if steps:
            _, masks = pruner.compress(max_steps=steps, max_epochs=config.search.epochs)
        seconds = time.perf_counter() - began
        if config.search.reestimates_norm and steps:
            context.data.restart()
            pruner.reestimate_norm(context.data.train)
        rows.append(Row("jackpot", context.evaluate(model), sparsity, config.search.epochs))
        tracker.final(rows[-1].accuracy)
    pruner.unwrap_model()
    _check_frozen(model, dense)

    tuned = config.finetune.epochs and config.finetune.under
    if tuned in ("initial", "both"):
        rows.append(_tuned(context, "initial_tuned", dense, start, config.finetune.epochs))
    if tuned in ("jackpot", "both"):
        found = copy.deepcopy(model.state_dict())  # with its normalisation statistics
        total = config.search.epochs + config.finetune.epochs
        rows.append(_tuned(context, "jackpot_tuned", found, masks, total))
    apply_masks(model, masks)
    result = Result(rows, mask_overlap(start, masks).total, seconds, run.folder, pruner.resumed_step)
    if rank() == 0:
        save_masks(start, run.work / START)
        save_masks(masks, run.work / MASKS)
        replace_file(run.work / JACKPOT, lambda aside: save_tensors(model.state_dict(), aside))
        result = run.finish(result, config)
    barrier()
    return result


def _make_pruner(context: RunContext, tracker: Tracker) -> tuple[LotteryJackpotPruner, Masks]:
    """Wrap the model, with an evaluator whose loop feeds the tracker; return the initial masks as well."""
    model, options = context.model, context.config.search

    searching = False  # SNIP and GraSP run the loop as well, for the gradient of the dense network
    steps = 0

    def on_step(loss: Tensor) -> None:
        nonlocal steps
        if not searching:
            return
        steps += 1
        if steps <= pruner.resumed_step:
            tracker.skip_step()
        else:
            tracker.step(loss, learning_rate=pruner.learning_rate, flips=pruner.flips)

    def on_epoch() -> None:
        if not searching:
            return
        # The last step that is skipped leaves the masks that it left before.
        is_known = steps == pruner.resumed_step and broadcast_result(tracker.has_next_epoch)
        if steps < pruner.resumed_step or is_known:
            tracker.skip_epoch()
            return
        masks = pruner.get_masks()
        overlap = mask_overlap(start, masks).total
        # Said again, for a resumed process that finds an epoch at its end, and takes no step of it.
        last = {"learning_rate": pruner.learning_rate, "flips": pruner.flips}
        tracker.epoch(accuracy_so_far(), **last, overlap=overlap, layers=densities(masks))

    def accuracy_so_far() -> float:
        """Return what the accuracy would be if the search ended here."""
        if not options.reestimates_norm:
            return context.evaluate(model)
        with same_random_states(), preserve_stats(model):  # the search goes on as if nobody had looked
            pruner.reestimate_norm(context.data.sample)
            return context.evaluate(model)

    def training_step(batch: Batch, model: nn.Module) -> Tensor:
        loss = cross_entropy_step(batch, model)
        if searching and steps >= pruner.resumed_step:  # before, it is only for its random numbers
            tracker.note(loss)
        return loss

    def training_func(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        context.data.train.pass_over(pruner.resumed_step if searching else 0)
        # Criteria take the mean over all processes themselves.
        model = averaged(model) if searching else model
        fit(model, *args, **kwargs, loader=context.data.train, on_step=on_step, on_epoch=on_epoch)

    # NNI drives every search by the user's optimizer; this one finds no gradient, for all weights are frozen.
    optimizer = nni.trace(SGD)(model.parameters(), lr=0.1)
    pruner = LotteryJackpotPruner(
        model,
        list(context.config.config_list),
        TorchEvaluator(training_func, optimizer, training_step),
        init=options.init,
        **pruner_options(options),
    )
    pruner.checkpoint_to(
        context.run.work / SEARCH,
        options.checkpoint_every,
        context.what_a_search_depends_on(),
        keep=True,  # until weights have been tuned as well
        minutes=options.checkpoint_minutes,
        beside=tracker,
    )
    context.data.restart()
    searching = True
    start = pruner.get_masks()
    return pruner, start


def _with_norm_reestimated(context: RunContext) -> float:
    """Return the accuracy under the masks as they are, had the normalisation statistics followed them."""
    with preserve_stats(context.model):
        reestimate(context.model, context.data.train)
        context.data.restart()
        return context.evaluate(context.model)


def _tuned(context: RunContext, kind: str, state: dict[str, Tensor], masks: Masks, epochs: int) -> Row:
    """Tune the weights of a state dict under masks that stay as they are (Eq. 9)."""
    context.data.restart()
    model = copy.deepcopy(context.model)
    model.load_state_dict(state)
    try:
        context.train(model, context.config.finetune, kind, context.run.work / TUNED[kind], masks)
    except TrainingDivergedError:
        context.run.delete_stale(*TUNED.values())  # the remedy is another lr, for both
        raise
    return Row(kind, context.evaluate(model), sparsity_of(masks), epochs)


def _check_frozen(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """See that the search has kept its promise; norm statistics are no parameters."""
    changed = [
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, dense[name])
    ]
    if changed:
        raise JackpotError(f"the search changed weights, which is a defect of nni_jackpot: {changed}")
