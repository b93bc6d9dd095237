"""What is found wrong with a run's device and config list, before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nni_jackpot.errors import ConfigListError, JackpotError, NothingKeptError
from nni_jackpot.experiment.config import RunConfig, SearchConfig, to_dict
from nni_jackpot.pruner import LotteryJackpotPruner


def pruner_options(config: SearchConfig) -> dict[str, Any]:
    """Return a search's options for the pruner, but for `init`, which may need gradients."""
    others = ("epochs", "init", "reestimate_norm", "checkpoint_every", "checkpoint_minutes")
    options = {name: value for name, value in to_dict(config).items() if name not in others}
    if config.method == "supermask":
        options = {k: v for k, v in options.items() if k not in ("kept_score", "pruned_score")}
    return options


def validate_config_list(config: RunConfig, model: nn.Module, is_pretrained: bool = False) -> None:
    """Find what is wrong with a config list before weights are trained, on a network to throw away.

    Parameters
    ----------
    config
        The run.
    model
        The network.
    is_pretrained
        Whether it has its pre-trained weights, so that a ranking of them is the search's own.
    """
    try:
        LotteryJackpotPruner(
            model,
            list(config.config_list),
            **pruner_options(config.search),
        )
    except NothingKeptError:  # which a global ranking of other weights, or by another criterion, may avoid
        if is_pretrained and config.search.init == "magnitude":
            raise
    except JackpotError:
        raise
    except Exception as error:  # whatever NNI stumbles over in an entry
        raise ConfigListError(f"config_list: {type(error).__name__}: {error}") from error


def device_of(name: str) -> torch.device:
    """Return the device that a config names; raises JackpotError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise JackpotError(
            f"device {name} is not there: PyTorch sees no CUDA device; set device to auto or cpu"
        )
    if (index := torch.device(name).index or 0) and index >= (count := torch.cuda.device_count()):
        raise JackpotError(f"device {name} is not there: PyTorch sees {count}, from cuda:0 on")
    # Each process that torchrun has started has one of its own.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
