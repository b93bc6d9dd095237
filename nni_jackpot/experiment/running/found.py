"""The jackpot of a finished run, or of a ticket and its run's file, with its network and data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nni_jackpot.errors import CheckpointError, ExperimentConfigError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.folder.pretrained import cache_path, load_weights
from nni_jackpot.experiment.folder.result import CONFIG, Row, load_result
from nni_jackpot.experiment.folder.run_folder import JACKPOT, MASKS
from nni_jackpot.experiment.running.context import RunContext, comes_trained
from nni_jackpot.experiment.schema.plugins import import_plugins
from nni_jackpot.experiment.schema.rules import Invalid
from nni_jackpot.masks import Masks, apply_masks, load_masks, sparsity_of
from nni_jackpot.storage.ticket import load_ticket


@dataclass(frozen=True)
class Found:
    """A jackpot with what it was found with.

    Attributes
    ----------
    context
        Data, task, and the network; without its pre-trained weights, unless it is one of transformers.
    model
        The masked network.
    masks
        The masks.
    """

    context: RunContext
    model: nn.Module
    masks: Masks

    def rows(self) -> list[Row]:
        """Measure the dense network and the jackpot on the run's test data.

        Raises
        ------
        CheckpointError
            If the pre-trained weights are not there any more.
        """
        context = self.context
        _load_base(context)
        rows = [context.row("dense", context.model, 0.0)]
        return [*rows, context.row("jackpot", self.model, sparsity_of(self.masks))]


def find(place: Path, file: Path | None, overrides: Mapping[str, object], plugins: Sequence[str]) -> Found:
    """Load the jackpot of a run's folder or of a ticket.

    Parameters
    ----------
    place
        Folder of a finished run, or a ticket.
    file
        YAML file of the run that a ticket is of; None for ``config.yml`` beside the ticket.
    overrides
        Values that replace those of the file, such as ``data.root`` on another machine.
    plugins
        Modules to import. Those of a run are not imported unless they are named here: a folder from outside
        runs no code.

    Raises
    ------
    JackpotError
        One of its kinds for a run, a ticket, a config or weights that are missing, damaged or of another
        network.
    """
    try:
        import_plugins(list(plugins), Path.cwd())
    except Invalid as error:
        raise ExperimentConfigError(f"--plugin: {error.text}") from None
    if place.is_dir():
        if file is not None:
            raise ExperimentConfigError(f"--config is for tickets, and {place} is the folder of a run")
        config = _config(place / CONFIG, overrides, plugins)
        load_result(place).check_files(MASKS, JACKPOT)
        masks = load_masks(place / MASKS)
        context = RunContext(config)
        model = copy.deepcopy(context.model)
        load_weights(model, place / JACKPOT)
        return Found(context, apply_masks(model, masks), masks)
    ticket = load_ticket(place)
    path = file or place.parent / CONFIG
    if not path.is_file():
        raise ExperimentConfigError(
            f"{place} has a jackpot without network and data: name its run's YAML file by --config FILE"
        )
    config = _config(path, overrides, plugins)
    context = RunContext(config)
    _load_base(context)
    model = copy.deepcopy(context.model)
    ticket.apply(model)  # checks the base first
    return Found(context, model, ticket.masks)


def _config(path: Path, overrides: Mapping[str, object], plugins: Sequence[str]) -> RunConfig:
    config = load_config(path, overrides, is_stored=True)
    if missing := [name for name in config.plugins if name not in plugins]:
        raise ExperimentConfigError(
            f"{path} needs the code of {', '.join(missing)}, which is imported only on request: add "
            + " ".join(f"--plugin {name}" for name in missing)
        )
    return config


def _load_base(context: RunContext) -> None:
    """Load the pre-trained weights of a network; one of transformers comes with its own."""
    config = context.config
    if comes_trained(config):
        return
    path = Path(config.pretrain.checkpoint or cache_path(config))
    if not path.exists():
        raise CheckpointError(
            f"the pre-trained weights are not there, {path}: nni-jackpot pretrain FILE makes them again, and "
            "--set pretrain.cache=FOLDER names another folder"
        )
    load_weights(context.model, path)
