"""The targets of a config list, for a search block by block."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nni_jackpot.errors import ConfigListError
from nni_jackpot.experiment.checks import config_list_of, pruner_options
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.nni_bridge.grouping import by_name
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.search.blockwise import Target


def targets_in(config: RunConfig, model: nn.Module) -> dict[str, Target]:
    """Return what the config list of a run selects, by the names of parameters, with the grains to keep.

    Parameters
    ----------
    config
        The run.
    model
        The network; it is not changed.

    Raises
    ------
    ConfigListError
        If layers share scores, or other tensors follow the masks: the search of a block cannot know them.
    """
    pruner = LotteryJackpotPruner(
        copy.deepcopy(model), config_list_of(config, model), **pruner_options(config.search)
    )
    found = by_name(pruner._targets.groups, pruner._target_spaces)
    groups = [group for group in pruner._targets.groups if len(group.members) > 1]
    if groups:
        raise ConfigListError(f"search.blockwise: {groups[0]} shares its scores: give it no dependency group")
    targets = {}
    for module, masks in pruner.get_masks().items():
        for name, mask in masks.items():
            if mask is None or torch.all(mask == 1):
                continue
            if (module, name) not in found:
                raise ConfigListError(
                    f"search.blockwise: {module}.{name} follows the mask of another parameter; select single "
                    "weights or an N:M pattern"
                )
            parameter = found[module, name]
            # Conv1D of transformers has its outputs last.
            is_usual = isinstance(model.get_submodule(module), nn.Linear | nn.modules.conv._ConvNd)
            targets[f"{module}.{name}"] = Target(parameter.grains, parameter.keep, 0 if is_usual else 1)
    return targets
