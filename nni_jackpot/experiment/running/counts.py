"""What a config list prunes, and how much of it, where the shapes of weights decide."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nni_jackpot.experiment.checks import config_list_of
from nni_jackpot.experiment.config import RunConfig
from nni_jackpot.masking.budgets import BUDGETS
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.modules.parameters import join, refuse_other_readers
from nni_jackpot.nni_bridge.config_list import check_config_list
from nni_jackpot.nni_bridge.grouping import by_name, group_targets
from nni_jackpot.nni_bridge.live_mask_pruner import LiveMaskPruner
from nni_jackpot.search.initial_masks import budgets_of, check_budgets

# Budgets and keys of entries that look at nothing but shapes.
_BUDGETS = ("as_configured", "erdos_renyi_kernel")
_KEYS = {
    *("op_types", "op_names", "op_names_re", "target_names", "sparse_ratio", "sparse_pattern"),
    *("exclude_op_types", "exclude_op_names", "exclude_op_names_re"),
}


def do_shapes_decide(config: RunConfig, model: nn.Module) -> bool:
    """Return True if the config list of a run gives every target a number of grains by its shape alone."""
    entries = config_list_of(config, model)
    return config.search.budget in _BUDGETS and not any(entry.keys() - _KEYS for entry in entries)


class ShapeCounts(LiveMaskPruner):
    """Count the grains that the targets of a run keep, without scores, masks or a copy of a weight.

    A pruner holds four more numbers for every searched weight, which would be the largest thing in memory.

    Parameters
    ----------
    config
        A run of which `do_shapes_decide` is true.
    model
        The network; it is not changed.

    Attributes
    ----------
    found
        Targets by module and parameter name, with the number of grains to keep.

    Raises
    ------
    JackpotError
        One of its kinds for a config list that does not fit the network, as by ``LotteryJackpotPruner``.
    """

    _norm = "adapt"
    _is_settled = False  # nothing is ever wrapped

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        entries = check_config_list(model, config_list_of(config, model))
        super().__init__(_without_values(model), entries, None, {})
        self._adopt_wrappers()
        groups = group_targets(self._target_spaces, self._module_wrappers, MaskedParameter)
        no_importance = dict.fromkeys(groups, torch.empty(0))
        counts = budgets_of(groups, BUDGETS[config.search.budget], no_importance, no_importance, False)
        check_budgets(counts)
        for group, keep in counts.items():
            group.set_keep(keep)
        self.found = by_name(groups, self._target_spaces)
        names = {str(parameter): join(*name) for name, parameter in self.found.items()}
        refuse_other_readers(model, {key: model.get_parameter(name) for key, name in names.items()})


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device; tensors stay shared where they were."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        values = torch.empty_like(tensor, device="meta")
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    memo: dict[int, Any] = {id(tensor): empty(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
