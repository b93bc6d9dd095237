"""Rows of comparators: weights that train under masks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nni_jackpot.errors import TrainingDivergedError
from nni_jackpot.experiment.comparators import Comparator
from nni_jackpot.experiment.folder.result import Row
from nni_jackpot.experiment.folder.run_folder import checkpoint_of, phase_of
from nni_jackpot.experiment.models import build_model
from nni_jackpot.experiment.models.section import ModelConfig
from nni_jackpot.experiment.running.context import RunContext
from nni_jackpot.experiment.running.cost import Cost, changes_weights, measured
from nni_jackpot.masks import Masks, named_masks, sparsity_of
from nni_jackpot.modules.parameters import join, names_of_all
from nni_jackpot.runtime.resume import same_random_states
from nni_jackpot.training import initial_masks


def compare(
    context: RunContext,
    name: str,
    comparator: Comparator,
    state: Mapping[str, Tensor],
    masks: Masks,
    until: Cost,
    targets: Collection[str],
) -> tuple[Row, Masks]:
    """Train weights as a comparator does, and return its row and its masks.

    Parameters
    ----------
    context
        The run.
    name, comparator
        The comparator.
    state
        Weights at the start, unless they are random.
    masks
        Masks at the start, or their numbers of kept weights.
    until
        Cost of these masks.
    targets
        Names of what is pruned.

    Raises
    ------
    TrainingDivergedError
        If the loss is not finite at the end of an epoch, or the comparator ranks a NaN.
    """
    config = context.config
    context.data.restart()
    model = copy.deepcopy(context.model)
    model.load_state_dict(state)
    if comparator.from_scratch:
        _randomize(context, model)
    masks = {
        module: {target: mask for target, mask in of.items() if join(module, target) in targets}
        for module, of in masks.items()
    }
    file = context.run.work / checkpoint_of(name)
    is_resumed = file.exists()
    try:
        with measured(context.device) as cost:
            if comparator.has_own_masks:
                masks = _own_masks(context, comparator, model, masks)
            masks = context.train(model, comparator, phase_of(name), file, masks)
    except TrainingDivergedError:
        # The remedy is another lr, for all comparators with these settings.
        same = [other for other, own in config.compared.items() if own.lr == comparator.lr]
        context.run.delete_stale(*map(checkpoint_of, same))
        raise
    before = config.search.epochs if comparator.start == "jackpot" else 0
    cost = replace(cost, seconds=None) if is_resumed else cost
    cost = cost if comparator.has_own_masks else until + cost
    row = context.row(name, model, sparsity_of(masks, targets), before + comparator.all_epochs, cost)
    return replace(row, weights_changed=changes_weights(model, state, masks)), masks


def _randomize(context: RunContext, model: nn.Module) -> None:
    """Give a model random weights by the seed of the run."""
    config, data = context.config, context.data
    with same_random_states():
        torch.manual_seed(config.seed)
        assert isinstance(config.model, ModelConfig)  # the config has checked it
        drawn = build_model(replace(config.model, weights=None), data.num_classes, data.shape[0])
    model.load_state_dict(drawn.state_dict())


def _own_masks(context: RunContext, comparator: Comparator, model: nn.Module, masks: Masks) -> Masks:
    """Return masks by the comparator's criterion, which keep as many weights as other masks."""
    given, parameters = named_masks(masks), names_of_all(model)
    first = {id(parameters[name]): name for name in reversed(given)}  # tied weights have several names
    weights = {name: parameters[name] for name in first.values()}
    keep = sum(int(given[name].count_nonzero()) for name in weights)
    with same_random_states():
        torch.manual_seed(context.config.seed + 1)  # not the numbers that the weights are made of
        found = initial_masks(weights, keep, comparator.start, comparator.budget, context.losses_of(model))
    return {
        module: {
            target: found[first[id(parameters[join(module, target)])]].to(mask)
            for target, mask in of.items()
            if mask is not None
        }
        for module, of in masks.items()
    }
