"""The targets of a config list, for a search block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD

from nni_jackpot.errors import ConfigListError
from nni_jackpot.experiment.checks import config_list_of, pruner_options
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.experiment.running.counts import ShapeCounts, do_shapes_decide
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masks import named_masks
from nni_jackpot.modules.parameters import join
from nni_jackpot.nni_bridge.grouping import by_name
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.runtime.resume import same_random_states
from nni_jackpot.search.blockwise import Target


def targets_in(
    config: RunConfig, model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, nn.Module], Tensor]
) -> dict[str, Target]:
    """Return what the config list of a run selects, by the names of parameters, with the grains to keep.

    Zeros are shared out by ``search.budget``. The budget `global_rank` ranks weights by ``search.init``.

    Parameters
    ----------
    config
        The run.
    model
        The network; it is not changed.
    batches
        Calibration data, of which the first are used by a budget that needs data.
    loss
        Loss of a batch and a network, for a budget that needs losses.

    Raises
    ------
    ConfigListError
        If layers share scores, or other tensors follow the masks: the search of a block cannot know them.
    """
    if do_shapes_decide(config, model):
        found = ShapeCounts(config, model).found
    else:
        found = _ranked(config, model, batches, loss)
    targets = {}
    for (module, name), parameter in found.items():
        if parameter.keep == parameter.grains.count:
            continue
        # Conv1D of transformers has its outputs last.
        is_usual = isinstance(model.get_submodule(module), nn.Linear | nn.modules.conv._ConvNd)
        targets[join(module, name)] = Target(parameter.grains, parameter.keep, 0 if is_usual else 1)
    return targets


def _ranked(
    config: RunConfig, model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, nn.Module], Tensor]
) -> dict[tuple[str, str], MaskedParameter]:
    """Return what a pruner of a copy of the network finds, which ranks weights."""
    options, tried = config.search, copy.deepcopy(model)

    def train(
        model: nn.Module, optimizer: SGD, step: Callable[..., Tensor], _: Any, max_steps: int, __: Any
    ) -> None:
        for batch in islice(cycle(batches), max_steps):  # in eval mode, as in the search of blocks
            step(batch, model).backward()
            optimizer.step()

    evaluator = TorchEvaluator(train, nni.trace(SGD)(tried.parameters(), lr=0.1), loss)
    with same_random_states():
        torch.manual_seed(config.seed)  # a resumed run finds the same budgets
        pruner = LotteryJackpotPruner(
            tried, config_list_of(config, model), evaluator, init=options.init, **pruner_options(options)
        )
    found = by_name(pruner._targets.groups, pruner._target_spaces)
    groups = [group for group in pruner._targets.groups if len(group.members) > 1]
    if groups:
        raise ConfigListError(f"search.blockwise: {groups[0]} shares its scores: give it no dependency group")
    for where, mask in named_masks(pruner.get_masks()).items():
        if tuple(where.rpartition(".")[::2]) not in found and not torch.all(mask == 1):
            raise ConfigListError(
                f"search.blockwise: {where} follows the mask of another parameter; select single weights or "
                "an N:M pattern"
            )
    return found
