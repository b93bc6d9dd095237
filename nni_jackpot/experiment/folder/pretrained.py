"""Pre-trained weights: read from a file, or trained once and cached under the hash of their settings.

Training starts from the network's own weights, random or published. Without epochs, these are the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from filelock import FileLock
from torch import Tensor, nn

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, OutputFolderError, first_few
from nni_jackpot.experiment.config import RunConfig, config_hash, to_dict
from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.models import has_new_classifier
from nni_jackpot.experiment.models.checkpoints import class_counts, read_checkpoint
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.models.section import ModelConfig, TransformersConfig
from nni_jackpot.experiment.models.vision import load_image_classifier
from nni_jackpot.runtime.distributed import barrier, broadcast_result, rank
from nni_jackpot.runtime.files import (
    check_folder,
    remove_leftovers,
    replace_file,
    save_tensors,
)
from nni_jackpot.runtime.resume import remove_files


def cache_path(config: RunConfig) -> Path:
    """Return the path of the cached weights of this run's pre-training."""
    parts = {name: to_dict(getattr(config, name), ["weights"]) for name in ("data", "model", "pretrain")}
    del parts["pretrain"]["checkpoint"]  # None where weights are trained
    key = config_hash({"seed": config.seed, **parts})
    model = config.model.name.replace("/", "-")
    return Path(config.pretrain.cache) / f"{config.data.name}-{model}-{key}.pth"


def check_start(config: RunConfig, num_classes: int) -> None:
    """Check that the config names one source for all weights.

    Raises
    ------
    ExperimentConfigError
        If it names two sources, or none for a new classifier.
    """
    weights, pretrain = getattr(config.model, "weights", None), config.pretrain
    if not isinstance(config.model, ModelConfig) or weights is None:
        return
    if pretrain.checkpoint is not None:
        raise ExperimentConfigError(
            f"model.weights is {weights} and pretrain.checkpoint is {pretrain.checkpoint}: one of them must "
            "be null"
        )
    if not pretrain.epochs and has_new_classifier(config.model, num_classes):
        raise ExperimentConfigError(
            f"model.weights: {weights} of {config.model.name} are for other classes than the dataset's "
            f"{num_classes}, so that the classifier is a new one: give it pretrain.epochs > 0"
        )


def check_pretrained(model: nn.Module, config: RunConfig) -> bool:
    """Check that the file of pre-trained weights fits a model or, if it is missing, can be written.

    The model is changed: pass a copy.

    Returns
    -------
    bool
        Whether the file exists; the model then has its weights.

    Raises
    ------
    CheckpointError, OutputFolderError
        As `ensure_pretrained` does.
    """
    given = config.pretrain.checkpoint
    path = cache_path(config) if given is None else Path(given)
    is_there = given is not None or path.exists()
    if is_there:
        load_weights(model, path)
    else:
        check_folder(path.parent)
    return is_there


def interrupted_training(config: RunConfig) -> Path | None:
    """Return the file that a training of these weights would resume from; None if nothing will be trained."""
    path = cache_path(config)
    return None if config.pretrain.checkpoint is not None or path.exists() else _interrupted(path)


def _interrupted(path: Path) -> Path:
    return path.with_suffix(".epoch")


def ensure_pretrained(model: nn.Module, config: RunConfig, train: Callable[[Path], None]) -> Path:
    """Load pre-trained weights into the model; train them first if they are not cached.

    Parameters
    ----------
    model
        The network of the config.
    config
        The run.
    train
        Trains the model in place, given the path of the file to resume from. That file is beside the cached
        weights, so that another run with the same pre-training finds it.

    Returns
    -------
    Path
        The file of the weights.

    Raises
    ------
    CheckpointError
        If ``pretrain.checkpoint`` is missing, unreadable, or belongs to another network.
    OutputFolderError
        If the cache folder cannot be written; raised before the training.
    """
    if config.pretrain.checkpoint is not None:
        path = Path(config.pretrain.checkpoint)
        load_weights(model, path)
        return path
    path = cache_path(config)
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Parallel trials need the same weights: one trains, the others wait.
        if rank() == 0:
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise OutputFolderError(f"cannot keep pre-trained weights in {path.parent}: {error}") from error
    try:
        interrupted = _interrupted(path)
        if rank() == 0:
            remove_leftovers(path, interrupted)
        if not broadcast_result(path.exists):
            train(interrupted)
            if rank() == 0:
                replace_file(path, lambda aside: save_tensors(model.state_dict(), aside))
            barrier()
        remove_files(interrupted)
    finally:
        lock.release()
    load_weights(model, path)
    return path


def pretrained_weights(config: RunConfig, names: Collection[str]) -> dict[str, Tensor]:
    """Return the pre-trained weights of a run that was made before, from where it had them.

    Parameters
    ----------
    config
        The run.
    names
        Names of the network's tensors.

    Raises
    ------
    CheckpointError
        If they are not there any more, or cannot be read.
    """
    if not isinstance(config.model, TransformersConfig):
        return read_checkpoint(Path(config.pretrain.checkpoint or cache_path(config)), names)
    load = load_language_model if isinstance(config.data, TextConfig) else load_image_classifier
    return load(config.model).network.state_dict()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint, every tensor of which must fit; no code in the file is executed.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, or belongs to another network; the model is then unchanged.
    """
    own = model.state_dict()
    state = read_checkpoint(path, own)
    if (counts := class_counts(state, own)) is not None:
        raise CheckpointError(
            f"{path} has {counts[0]} classes, and the data {counts[1]}: its classifier does not fit, and a "
            "new one would know nothing. Give the data the same classes, or train the network on the data's "
            "classes first, and name that checkpoint"
        )
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} is a checkpoint of another network: {first_few(wrong)}")
    model.load_state_dict(state)
