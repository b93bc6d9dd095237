"""An NNI pruner whose weights train under masks that change, by methods of the literature."""

from __future__ import annotations

from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nni_jackpot.errors import ConfigListError, NothingSearchedError
from nni_jackpot.masking.budgets import Rule
from nni_jackpot.masking.criteria import Criterion
from nni_jackpot.masks import Masks, apply_masks
from nni_jackpot.modules.parameters import join, names_of_all
from nni_jackpot.nni_bridge.config_list import ConfigList
from nni_jackpot.nni_bridge.evaluator_driver import EvaluatorLoop
from nni_jackpot.nni_bridge.grouping import single_weights
from nni_jackpot.pruner import LotteryJackpotPruner
from nni_jackpot.search.options import check_length
from nni_jackpot.training import DENSE, TRAINING_METHODS, SparseTraining, TrainingMethod


class SparseTrainingPruner(Pruner):
    """Train weights under masks, which a method changes meanwhile: the opposite of `LotteryJackpotPruner`.

    Weights change on purpose: the method trains them, and each pruned weight of the model itself is exactly
    zero, from the construction of the pruner on. No module is wrapped, so that every reader of a weight sees
    the zeros, and `unwrap_model` has nothing to undo. A weight that is grown again starts at zero, with its
    momentum reset.

    Parameters
    ----------
    model
        The model, with random or pre-trained weights.
    config_list
        NNI's config list, as for `LotteryJackpotPruner`; targets are single weights of parameters.
    evaluator
        NNI's evaluator; `compress` trains through its loop and optimizer.
    method
        A training method by name (``"rigl"``, ``"set"``, ``"gradual"``, ``"sparse_momentum"``, ``"dsr"``,
        ``"deep_r"``, ``"snip"``, ``"grasp"``, ``"static"``, ``"lt"``, or one that `register_training_method`
        has added) for its defaults, or with settings. ``"obd"`` ranks by losses, which runs from YAML alone
        give it.
    init
        Masks at the start, as for `LotteryJackpotPruner`; None for the criterion of the method's paper. A
        method that starts dense takes the numbers of kept weights alone.
    init_batches
        Number of batches that such criteria see.
    budget
        How zeros are shared out among targets, as for `LotteryJackpotPruner`.
    seed
        Seed of what the method draws.
    existed_wrappers
        Of another compressor, which is refused: weights that train belong to one compressor.

    Raises
    ------
    JackpotError
        One of its kinds (`nni_jackpot.errors`) for a config list that does not fit the model; the model is
        then unchanged.
    ValueError
        If an option is none of those above.

    Examples
    --------
    >>> pruner = SparseTrainingPruner(model, config_list, evaluator, method="rigl")
    >>> model, masks = pruner.compress(max_steps=1000, max_epochs=10)
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        method: str | TrainingMethod = "rigl",
        init: str | Criterion | Masks | None = None,
        init_batches: int = 1,
        budget: str | Rule = "as_configured",
        seed: int = 0,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
    ) -> None:
        if existed_wrappers:
            raise ConfigListError("SparseTrainingPruner cannot follow another compressor of a chain")
        self.method = TRAINING_METHODS.find(method)() if isinstance(method, str) else method
        if self.method.needs_losses:
            raise ConfigListError(
                f"the method {self.method.name} needs losses of a few batches, which this pruner has not: "
                "use nni_jackpot.training.SparseTraining, or a comparator of a run from YAML"
            )
        if init is None:
            init = "magnitude" if self.method.paper.masks == DENSE else self.method.paper.masks
        start = LotteryJackpotPruner(
            model, config_list, evaluator, init=init, init_batches=init_batches, budget=budget
        )
        try:
            masks, self._targets = (
                start.get_masks(),
                single_weights(start._targets.groups, start._target_spaces),
            )
        finally:
            start.unwrap_model()
        self._masks: Masks = masks
        self._seed = seed
        self._training: SparseTraining | None = None
        self._driver: Optimizer | None = None
        self._max_steps: int | None = None
        self._max_epochs: int | None = None
        super().__init__(model, start.config_list, evaluator)

    def _validate_config(self) -> None:
        """Do nothing: the config list has been checked in full."""

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> None:
        """Prune single weights."""

    def wrap_model(self) -> None:
        """Set pruned weights to zero; no module is wrapped."""
        self._is_wrapped = True
        if not self.method.is_dense_at_start:
            apply_masks(self.bound_model, self.get_masks())

    def unwrap_model(self) -> None:
        """Do nothing: no module is wrapped, and trained weights stay."""
        self._is_wrapped = False

    def _get_param_names_map(self) -> dict[str, str]:
        return {name: name for name, _ in self.bound_model.named_parameters()}

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of the current masks, ``{module: {target: mask}}``, in model order."""
        masks: dict[str, dict[str, Tensor | None]] = {}
        trained: Masks = {} if self._training is None else self._training.finish()
        for module, targets in self._masks.items():
            masks[module] = {}
            for name, mask in {**targets, **trained.get(module, {})}.items():
                is_dense = self._training is None and self.method.is_dense_at_start
                masks[module][name] = torch.ones_like(mask) if is_dense and mask is not None else _copy(mask)
        return masks

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Train through the evaluator, and return the model and its masks.

        Parameters
        ----------
        max_steps, max_epochs
            Length of the training. A `TorchEvaluator` needs the steps, since the schedules of the methods
            follow them. Methods that update once an epoch need the epochs as well.

        Raises
        ------
        NothingSearchedError
            If the loop takes no step with an optimizer that holds the targets.
        ConfigListError
            If the optimizer holds some of the targets alone; no step has been taken then.
        SearchDivergedError
            If a weight or gradient becomes NaN.
        """
        if self.evaluator is None:
            raise ValueError(
                "a training needs an evaluator: SparseTrainingPruner(model, config_list, evaluator)"
            )
        self._max_steps = check_length("compress(): max_steps", max_steps)
        self._max_epochs = check_length("compress(): max_epochs", max_epochs)
        self._check_length()
        model, _ = super().compress(self._max_steps, self._max_epochs)
        return model, self.get_masks()

    def _check_length(self) -> None:
        if self._max_steps is None and not EvaluatorLoop(self.evaluator).has_trainer:
            raise ValueError("compress(): a TorchEvaluator does not know its steps: give max_steps")
        if self._max_steps is None and self._max_epochs is None:
            raise ValueError("say how long to train: compress(max_steps, max_epochs)")
        if self._max_epochs is None and getattr(self.method, "every", 1) is None:
            raise ValueError(
                f"compress(): {self.method.name} updates once an epoch: give max_epochs, or set its `every`"
            )

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self._training is not None:  # trained before: continue from the masks of then
            self._masks = self.get_masks()
        self._training = self._driver = None
        hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            self._fusion_compress(max_steps, max_epochs)
        finally:
            for hook in hooks:
                hook.remove()
            if self.evaluator is not None and self.evaluator.model is not None:  # the training was cut short
                self.evaluator.unbind_model()
        if self._training is None:
            raise NothingSearchedError("the training loop took no step with an optimizer of the targets")

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        """Do nothing: hooks of PyTorch's optimizers follow the training."""

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        """Do nothing."""

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Begin with the first optimizer that holds the targets."""
        if self._training is not None:
            return
        parameters = names_of_all(self.bound_model)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [join(*target) for target in self._targets if id(parameters[join(*target)]) not in held]
        if len(missing) == len(self._targets):
            return
        if missing:
            raise ConfigListError(f"the optimizer does not train {missing[0]}, which is to be pruned")
        masks = {
            module: {name: mask for name, mask in targets.items() if (module, name) in self._targets}
            for module, targets in self._masks.items()
        }
        training = SparseTraining(self.bound_model, optimizer, masks, self.method, seed=self._seed)
        steps = self._max_steps or EvaluatorLoop(self.evaluator).total_steps() or 1
        if steps < self.method.trainings:
            needed = f"{self.method.name} has {self.method.trainings} trainings"
            raise ValueError(f"compress(): {needed}, and there are only {steps} steps")
        training.begin(steps, self._max_epochs or 1)
        self._driver, self._training = optimizer, training

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self._driver or self._training is None:
            return
        found_inf = getattr(optimizer, "found_inf", None)  # of a gradient scaler, if the optimizer is fused
        if found_inf is None or not found_inf.item():
            self._training.step()


def _copy(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.clone()
