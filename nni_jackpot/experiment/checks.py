"""Checks of a run's device and config list, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from nni_jackpot.errors import ConfigListError, JackpotError, NothingKeptError
from nni_jackpot.experiment.comparators import Comparator
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.presets import entries_of
from nni_jackpot.experiment.schema.search import SearchConfig
from nni_jackpot.masking.budgets import BUDGETS, criterion_of_budget
from nni_jackpot.masking.criteria import CRITERIA, needs_of
from nni_jackpot.nni_bridge.grouping import single_weights
from nni_jackpot.pruner import LotteryJackpotPruner


def config_list_of(config: RunConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the config list of a run, or the one that its preset makes for the network.

    Raises
    ------
    ConfigListError
        If the network has nothing that the preset can prune.
    """
    if config.preset is None:
        return list(config.config_list)
    return entries_of(config.preset, model, config.sparsity)


def pruner_options(config: SearchConfig, has_data: bool = True) -> dict[str, Any]:
    """Return a search's options for the pruner, without `init`, which may need data.

    Parameters
    ----------
    config
        The search.
    has_data
        Whether there are batches for a budget that needs them; if not, it is replaced by the configured one.
    """
    criterion = criterion_of_budget(BUDGETS[config.budget])
    is_possible = has_data or criterion is None or needs_of(criterion) == "weights"
    return {
        "init_batches": config.init_batches,
        "method": config.settings,
        "budget": config.budget if is_possible else "as_configured",
        "norm": config.norm,
    }


def validate_config_list(config: RunConfig, model: nn.Module, is_pretrained: bool = False) -> None:
    """Check a config list on a network before any weights are trained.

    Parameters
    ----------
    config
        The run.
    model
        The network, which is wrapped: pass a copy.
    is_pretrained
        Whether the network has its pre-trained weights, so that it ranks them as the search will.

    Raises
    ------
    JackpotError
        One of its kinds for a config list that does not fit the network.
    """
    try:
        options = pruner_options(config.search, has_data=False)
        pruner = LotteryJackpotPruner(model, config_list_of(config, model), **options)
        pruner.check_criterion(CRITERIA[config.search.init])
        if (by_budget := criterion_of_budget(BUDGETS[config.search.budget])) is not None:
            pruner.check_criterion(by_budget)
        _refuse_granularity(config, pruner)
    except NothingKeptError:  # a global ranking of other weights, or by another criterion, may avoid it
        if is_pretrained and config.search.init == "magnitude":
            raise
    except JackpotError:
        raise
    except Exception as error:  # an error of NNI about an entry
        raise ConfigListError(f"config_list: {type(error).__name__}: {error}") from error


def _refuse_granularity(config: RunConfig, pruner: LotteryJackpotPruner) -> None:
    """Raise ConfigListError if a comparator would prune single weights where channels are asked for."""
    for name, comparator in config.comparators.items():
        if isinstance(comparator, Comparator) and comparator.prunes_single_weights:
            try:
                single_weights(pruner._targets.groups, pruner._target_spaces)
            except ConfigListError as error:
                raise ConfigListError(f"comparators.{name}: {error}: leave it out") from error


def device_of(name: str) -> torch.device:
    """Return the device that a config names; raises JackpotError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise JackpotError(
            f"device {name} does not exist: PyTorch sees no CUDA device; set device to auto or cpu"
        )
    if (index := torch.device(name).index or 0) and index >= (count := torch.cuda.device_count()):
        raise JackpotError(f"device {name} does not exist: PyTorch sees {count}, from cuda:0 on")
    # Each process of torchrun has its own device.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def check_frozen(model: nn.Module, dense: Mapping[str, torch.Tensor], tuned: Collection[str] = ()) -> None:
    """Check that the search has changed no parameter but tuned ones; norm statistics are buffers."""
    changed = [
        name
        for name, parameter in model.named_parameters()
        if name not in tuned and not torch.equal(parameter, dense[name])
    ]
    if changed:
        raise JackpotError(f"the search changed weights, which is a defect of nni_jackpot: {changed}")
