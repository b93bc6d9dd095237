"""Device, data, network and task of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.checks import device_of, validate_config_list
from nni_jackpot.experiment.comparators import Comparator
from nni_jackpot.experiment.config import RunConfig, settings_of, to_dict
from nni_jackpot.experiment.data.loading import Data, load_data, load_text
from nni_jackpot.experiment.data.section import DataConfig, TextConfig
from nni_jackpot.experiment.folder.epoch_checkpoint import EpochFile
from nni_jackpot.experiment.folder.pretrained import (
    check_pretrained,
    check_start,
    ensure_pretrained,
    interrupted_training,
)
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.folder.run_folder import SEARCH, RunFolder, checkpoint_of, place_of
from nni_jackpot.experiment.models import build_model, validate_model
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.models.section import ModelConfig, TransformersConfig
from nni_jackpot.experiment.models.vision import load_image_classifier
from nni_jackpot.experiment.running.cost import Cost, total_epochs
from nni_jackpot.experiment.running.counts import ShapeCounts, do_shapes_decide
from nni_jackpot.experiment.running.image_task import ImageTask
from nni_jackpot.experiment.running.language_task import LanguageTask
from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.experiment.services import Services, check_services
from nni_jackpot.experiment.sight import tell_start
from nni_jackpot.experiment.tracking import Tracker
from nni_jackpot.experiment.train import train_weights
from nni_jackpot.masking.criteria import Losses
from nni_jackpot.masks import Masks, named_masks
from nni_jackpot.runtime.distributed import barrier, rank
from nni_jackpot.runtime.files import check_folder
from nni_jackpot.runtime.resume import check_state, digest
from nni_jackpot.search.match_dense import MATCHING_LOSSES
from nni_jackpot.training.losses import losses_on


class RunContext:
    """Device, data and network of a run, made from its config; nothing is written.

    Attributes
    ----------
    data, model, task
        Data, network, and what the network computes.
    tokenizer
        Tokenizer of a network of text; of images the processor of transformers, if the run uses its values,
        else None.
    run
        The folder that `open` was given.

    Raises
    ------
    JackpotError
        One of its kinds for a folder, a data set, weights or a config list that is not valid.
    """

    data: Data
    model: nn.Module
    task: ImageTask | LanguageTask
    tokenizer: Any
    run: RunFolder

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = device_of(config.device)
        # The fastest convolutions add up gradients in an order that varies; the same seed must give the same
        # mask.
        torch.backends.cudnn.deterministic = True
        check_folder(place_of(config))
        check_services(config.trackers)
        made = _text(config) if is_text(config) else _images(config)
        self.data, self.model, self.task, self.tokenizer = made
        if not self.task.has_labels and config.search.loss == "labels":
            raise ExperimentConfigError(
                f"search.loss: found labels, allowed for this network: {', '.join(MATCHING_LOSSES)}"
            )
        if config.search.blockwise is not None and do_shapes_decide(config, self.model):
            ShapeCounts(config, self.model)
        else:
            tried = copy.deepcopy(self.model)
            has_weights = comes_trained(config) or check_pretrained(tried, config)
            validate_config_list(config, tried, is_pretrained=has_weights)
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
        check_state(run.work / SEARCH, "search", self.what_a_search_depends_on())
        if (run.work / SEARCH).exists() or not self.steps:  # else they belong to another search
            for name, comparator in config.compared.items():
                known = self._what_a_training_depends_on(comparator)
                check_state(run.work / checkpoint_of(name), "training", known)
        if not comes_trained(config) and (file := interrupted_training(config)) is not None:
            check_state(file, "training", self._what_a_training_depends_on(config.pretrain))
        barrier()  # all processes have checked the files before the first one changes them
        run.begin(config)

    def services(self, phase: str = "search") -> Services:
        """Return the tracking services of a phase."""
        return Services(self.config.trackers, place_of(self.config) / phase, to_dict(self.config))

    @property
    def measure(self) -> str:
        """Name of the main measure."""
        return self.task.measures[0]

    def evaluate(self, model: nn.Module) -> float:
        """Return the main measure of a model on the test data, such as its accuracy."""
        return self.task.measure(model, self.data.test, self.device)[self.measure]

    def row(
        self, kind: str, model: nn.Module, sparsity: float, epochs: int = 0, cost: Cost | None = None
    ) -> Row:
        """Return the row of a model, with all its measures; its weights count as unchanged.

        Parameters
        ----------
        kind
            Kind of the row.
        model
            The network.
        sparsity
            Share of zeros of its masks.
        epochs
            Epochs after pre-training.
        cost
            Cost of the method; None if not known.
        """
        found = self.task.measure(model, self.data.test, self.device)
        return Row(
            kind,
            found.pop("accuracy", None),
            sparsity,
            epochs,
            found,
            total_epochs(self.config, kind, epochs),
            weights_changed=False,
            **({} if cost is None else vars(cost)),
        )

    def pretrain(self) -> Path | None:
        """Load the pre-trained weights into the model; train them first if they are not cached.

        Returns
        -------
        Path or None
            The file of the weights; None for a network that comes with them.
        """
        tell_start(self.config, self.device, self.data, self.model)
        if comes_trained(self.config):
            torch.manual_seed(self.config.seed)
            return None

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
        depends_on = {
            **self._what_a_training_depends_on(config),
            "weights": digest(model.state_dict().values()),
            "masks": digest(named_masks(masks or {}).values()),
        }
        file = EpochFile(interrupted, depends_on)
        if not interrupted.exists():
            self.run.delete_stale_logs(name)
        epochs = config.all_epochs if isinstance(config, Comparator) else config.epochs
        steps = epochs * len(loader)
        with Tracker(
            self.run.work / name,
            steps,
            description=name,
            rank=rank(),
            report_to_nni=False,
            measure=self.measure,
            services=self.services(name),
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
                training_step=self.task.loss,
                seed=self.config.seed,
                losses=self.losses_of(model),
            )

    def losses_of(self, model: nn.Module) -> Losses:
        """Return the losses of a model on the first few training batches."""
        return losses_on(model, self.data.sample, self.task.loss)

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
        length = {"max_steps": self.steps, "max_epochs": self.config.search.epochs}
        return {**own, **length, "device": self.device.type}


def is_text(config: RunConfig) -> bool:
    """Return True if the data of a run is text."""
    return isinstance(config.data, TextConfig)


def comes_trained(config: RunConfig) -> bool:
    """Return True if the network of a run has its weights from a folder of transformers."""
    return isinstance(config.model, TransformersConfig)


def _images(config: RunConfig) -> tuple[Data, nn.Module, ImageTask, Any]:
    assert isinstance(config.data, DataConfig)  # the config has checked it
    data = load_data(config.data, config.seed)
    torch.manual_seed(config.seed)
    check_start(config, data.num_classes)
    processor = None
    if isinstance(config.model, ModelConfig):
        model = build_model(config.model, data.num_classes, data.shape[0])
    else:
        assert isinstance(config.model, TransformersConfig)
        found = load_image_classifier(config.model, data.num_classes, data.classes)
        model = found.network
        if found.inputs == (config.data.image_size, config.data.preprocess):
            processor = found.processor
    channels, height, width = data.shape
    validate_model(config.model, model, data.num_classes, (channels, height, width))
    return data, model, ImageTask(data.num_classes), processor


def _text(config: RunConfig) -> tuple[Data, nn.Module, LanguageTask, Any]:
    assert isinstance(config.data, TextConfig)  # the config has checked it
    assert isinstance(config.model, TransformersConfig)
    loaded = load_language_model(config.model)
    data = load_text(config.data, config.seed, loaded.tokenizer, loaded.task)
    return data, loaded.network, LanguageTask(loaded.task), loaded.tokenizer
