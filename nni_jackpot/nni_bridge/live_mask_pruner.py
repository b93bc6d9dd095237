"""An NNI pruner whose model is frozen, and read under live masks, while it is wrapped."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.utils import Evaluator
from nni.compression.utils.scaling import Scaling
from torch import Tensor, nn

from nni_jackpot.masking.criteria import Criterion
from nni_jackpot.masks import Masks
from nni_jackpot.modules.batch_norm import reestimate
from nni_jackpot.modules.layouts import Layout, layout_of
from nni_jackpot.modules.parameters import holders_of
from nni_jackpot.modules.pretrained_files import save_as_before, save_by_plain_names
from nni_jackpot.modules.tuned import tunable
from nni_jackpot.nni_bridge.frozen_model import FrozenModel
from nni_jackpot.nni_bridge.grouping import tie
from nni_jackpot.nni_bridge.searched_targets import SearchedTargets
from nni_jackpot.nni_bridge.wrapper import SearchedWrapper, refresh_masks

_logger = logging.getLogger(__name__)

_CHANNELS = ("out_channel", "in_channel")


class LiveMaskPruner(Pruner):
    """NNI's pruner, with masks that follow scores, masked weights for all readers, and frozen parameters.

    Attributes
    ----------
    _targets
        What is pruned; set by the subclass.
    _norm
        ``"freeze"`` if norm statistics are frozen as well, ``"tune"`` if affines and biases are trained; set
        by the subclass.
    _is_settled
        Whether the config list has been checked in full, so that the model may be wrapped.
    """

    _targets: SearchedTargets
    _norm: str
    _is_settled: bool

    def _validate_config(self) -> None:
        """Do nothing: `check_config_list` has checked keys that NNI's schema does not know."""

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> str | None:
        """Prune single weights by default, where NNI's norm pruners prune channels."""
        return None if target_space.type is TargetType.PARAMETER else "per_channel"

    def _register_scalers(self) -> None:
        super()._register_scalers()
        for module_name, spaces in self._target_spaces.items():
            module = self._module_wrappers[module_name].module
            for name, space in spaces.items():
                if space.type is not TargetType.PARAMETER or space.granularity not in _CHANNELS:
                    continue
                if (layout := layout_of(module, name)) != Layout() and space.target is not None:
                    space._scaler = Scaling(layout.blocks(space.granularity, space.target.dim()), "back", -1)

    def _sort_by_model_order(self) -> None:
        """Put targets in model order: NNI takes them from a set of strings, new in every process."""
        order = {n: i for i, (n, _) in enumerate(self.bound_model.named_modules(remove_duplicate=False))}
        for by_module in (self._module_wrappers, self._target_spaces):
            items = sorted(by_module.items(), key=lambda item: order[item[0]])
            by_module.clear()
            by_module.update(items)

    def _adopt_wrappers(self) -> None:
        """Turn NNI's wrappers into those that give masked weights to all readers."""
        self._sort_by_model_order()
        tie(self._target_spaces, self._module_wrappers)
        holders = holders_of(self.bound_model)
        for wrapper in self._module_wrappers.values():
            SearchedWrapper.adopt(wrapper, holders)

    # -- wrapping

    def wrap_model(self) -> None:
        """Wrap the model and freeze it: only scores take gradients."""
        if not self._is_settled:  # NNI's constructor wraps before anything has been checked
            return
        if self._is_wrapped:
            _logger.warning("The model is wrapped already, there is nothing to wrap.")
            return
        searched = {id(parameter.weight) for parameter in self._targets.parameters}
        tuned = tunable(self.bound_model, searched) if self._norm == "tune" else {}
        self._frozen = FrozenModel(self.bound_model, self._norm == "freeze", tuned)
        try:
            super().wrap_model()
            self._frozen.freeze()
            self._frozen.spare_ddp((p.module_name, p.name) for p in self._targets.parameters)
            save_by_plain_names(self.bound_model)
        except BaseException:
            self._release()
            raise

    def _get_param_names_map(self) -> dict[str, str]:
        """Return the names of parameters now by their names before wrapping, for NNI's evaluators."""
        return {**super()._get_param_names_map(), **self._frozen.names_now()}

    @property
    def tuned(self) -> list[str]:
        """Names of the parameters that a search with ``norm="tune"`` trains; a ticket has their values."""
        return list(self._frozen.tuned)

    def unwrap_model(self) -> None:
        """Give the model back: its own modules, all parameters but `tuned` ones bit for bit."""
        if not self._is_wrapped:
            _logger.warning("The model is not wrapped, there is nothing to unwrap.")
            return
        self._release()

    def _release(self) -> None:
        """Undo `wrap_model`, also where it has failed halfway."""
        for wrapper in self._module_wrappers.values():
            if hasattr(wrapper.module, "_nni_wrapper"):
                wrapper.unwrap()
        self._is_wrapped = False
        save_as_before(self.bound_model)
        self._frozen.release()

    # -- NNI's search, and norm statistics

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        finally:
            if self.evaluator.model is not None:  # the search was cut short
                self.evaluator.unbind_model()

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if not self._is_wrapped:  # another compressor of the chain wraps and unwraps
            self._frozen.unfreeze()

    def reestimate_norm(self, batches: Any) -> None:
        """Re-estimate batch-norm statistics under the current masks, by one pass over batches.

        Parameters
        ----------
        batches
            Iterable of input batches, of dicts, or of lists and tuples that begin with the inputs
            (`modules.batches.call_model`). Under `torch.distributed` the statistics are the mean over the
            batches of all ranks.

        Raises
        ------
        CalibrationError
            If there is no batch, or the model fails on one; the statistics are then unchanged.
        """
        self._frozen.release_statistics()
        try:
            reestimate(self.bound_model, batches)
        finally:
            self._frozen.freeze_statistics()

    # -- masks and scores

    def check_criterion(self, criterion: Criterion) -> None:
        """Check that all targets have the evidence that a criterion needs; raises ConfigListError."""
        self._targets.check_criterion(criterion)

    def score_parameters(self) -> list[nn.Parameter]:
        """Return the scores in model order, one parameter for each target or dependency group.

        Masks follow the scores, whichever optimizer changes them.
        """
        return [group.score for group in self._targets.groups]

    @property
    def flips(self) -> int:
        """Number of weights that entered or left a mask in the last update of the masks."""
        by_device: dict[torch.device, int | Tensor] = defaultdict(int)
        for parameter in self._targets.parameters:
            by_device[parameter.score.device] += parameter.flips
        return sum(map(int, by_device.values()))

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of the current masks, ``{module: {target: mask}}``, in model order."""
        for wrapper in self._module_wrappers.values():
            refresh_masks(wrapper)
        # Plain dicts, so that a file of them loads with torch's weights_only.
        return {module_name: dict(masks) for module_name, masks in super().get_masks().items()}

    def generate_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return the current masks (NNI's name for `get_masks`)."""
        return self.get_masks()

    def update_masks(self, masks: Masks) -> None:
        """Set masks, the budgets that follow from them, and the scores that belong to them.

        Raises
        ------
        MaskError
            If a mask is for a target that this pruner does not have, or does not have the target's shape.
        NothingKeptError
            If a mask keeps nothing.
        """
        super().update_masks(self._targets.set_masks(masks))
