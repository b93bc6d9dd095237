"""The NNI pruner: config list and evaluator in, masks out, and not one weight changed."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from nni.compression.utils.scaling import Scaling
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nni_jackpot.errors import ConfigListError, MaskError
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masking.masked_weights import without_gradients
from nni_jackpot.masking.methods.supermask import SampledMask
from nni_jackpot.masking.targets import ScoredTarget, ScoreGroup
from nni_jackpot.masks import Masks, check_unwrapped
from nni_jackpot.modules.batch_norm import freeze_stats, reestimate
from nni_jackpot.modules.parameters import (
    holders_of,
    names_of_all,
    refuse_other_readers,
    steady_parametrizations,
)
from nni_jackpot.nni_bridge.calibration import losses_of
from nni_jackpot.nni_bridge.channels import is_transposed
from nni_jackpot.nni_bridge.config_list import ConfigList, check_config_list, refuse_targets_taken
from nni_jackpot.nni_bridge.evaluator_driver import EvaluatorLoop
from nni_jackpot.nni_bridge.given_masks import kept_by
from nni_jackpot.nni_bridge.grouping import align_targets, by_name, group_targets, tie
from nni_jackpot.nni_bridge.wrapper import SearchedWrapper, refresh_masks
from nni_jackpot.search.checkpoint import Checkpoint
from nni_jackpot.search.clock import cosine
from nni_jackpot.search.initial_masks import budgets_of, check_budgets, pools_of
from nni_jackpot.search.loop import Search
from nni_jackpot.search.options import SCORES, check_length, needs_losses, recipe_and_scores
from nni_jackpot.search.sparsity_schedule import Growth

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

_logger = logging.getLogger(__name__)

# Where DistributedDataParallel looks up what not to send.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# What NNI's scheduled pruners change during a search.
_GOALS = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio")


class LotteryJackpotPruner(Pruner):
    """Find a lottery jackpot: a sparse sub-network of a pre-trained network with frozen weights (Eq. 8).

    Masks start from a pruning criterion and follow scores, one a weight, which edge-popup trains (Eq. 4-6).
    A target of k weights at sparse ratio p has exactly ``int(p * k)`` zeros, a global group as many in all:
    at the end, and under ``recipe="paper"`` at every moment. All parameters of the model are frozen while it
    is wrapped; `unwrap_model` gives them back as they came, bit for bit.

    Parameters
    ----------
    model
        Pre-trained model. It is wrapped at once, with the initial masks live.
    config_list
        `NNI's config list <https://nni.readthedocs.io/en/stable/compression/config_list.html>`__. Single
        weights are searched unless a ``granularity`` asks for channels or blocks, each of which then has one
        score. Targets of one ``global_group_id`` are ranked together by initial importance, which gives each
        its budget, as does a ``sparse_threshold`` on the importance; where the recipe lets them, they trade
        weights in the course of the search. Targets of one ``dependency_group_id`` share scores and masks.
        Biases follow the channels of their weights (``align``), and stay whole where single weights are
        searched. Beyond NNI, ``sparse_pattern`` (``"2:4"``) keeps N of every M weights along the input
        dimension.
    evaluator
        NNI's evaluator; `compress` searches through its training loop. Without one, train
        `score_parameters` in a loop of your own.
    init
        Where the search starts: a criterion, ``"magnitude"``, ``"random"``, ``"snip"`` or ``"grasp"`` (the
        last two need an evaluator), or NNI masks of every searched target, such as another pruner's.
    init_batches
        How many batches SNIP and GraSP take their gradients from.
    budget
        How zeros are shared out among targets that are in no global group: ``"as_configured"``, every target
        at its own sparse ratio; ``"global_rank"``, all of them in one ranking; or ``"erdos_renyi_kernel"``,
        densities by the shapes of the weights. The total of zeros is the same.
    method
        ``"edge_popup"``, or ``"supermask"``: training sees masks drawn by probabilities, of which the scores
        are the logits (`masking.methods.supermask`), and of the recipe there is only the optimizer, at a
        rate for logits. The mask is that of the largest scores in either case.
    kept_score, pruned_score
        Initial scores of kept and of pruned weights (Sec. 4.1), under edge-popup.
    recipe
        How scores are trained: ``"jackpot"``, found to need fewer epochs (docs/recipes.md), or ``"paper"``,
        the settings of Sec. 4.1. See `nni_jackpot.search.recipes.Recipe`.
    lr, momentum, weight_decay, growth, temperature, hardening
        Take the place of the recipe's.
    optimizer
        Makes another optimizer from the list of scores; replaces the recipe's and its three settings. Its
        learning rates are those at the start of the schedule.
    swap_limit
        Largest share of a target's kept weights that may be replaced in one step (the short restriction of
        the paper's journal version), annealed by the schedule; None for no limit. With ``recipe="paper"`` and
        edge-popup only, and not with a ``sparse_pattern`` or ``internal_metric_block``.
    schedule
        Factor of the learning rate at a progress in [0, 1]; half a cosine by default (Sec. 4.1).
    adapt_norm
        Whether normalisation statistics adapt to the masks in train mode, as in the paper. If not, layers
        that track statistics use them as they are, in train mode too, and never change them: right for
        channels, since a layer that normalises by batch takes away the gradient of a channel's scale.
    existed_wrappers
        Used by `from_compressor`.

    Raises
    ------
    JackpotError
        One of its kinds (`nni_jackpot.errors`) for a config list that does not fit the model; the model is
        then as it was.
    ValueError
        If an option is none of those above, or does not go with the others.

    Examples
    --------
    >>> pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}], evaluator)
    >>> model, masks = pruner.compress(max_steps=None, max_epochs=10)
    >>> pruner.unwrap_model()
    """

    # NNI's LinearPruner and AGPPruner set these on the pruner whose sparse ratios they schedule.
    interval_steps: int | None = None
    total_times: int | None = None

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        init: str | Masks = "magnitude",
        init_batches: int = 1,
        budget: str = "as_configured",
        method: str = "edge_popup",
        kept_score: float = SCORES[0],
        pruned_score: float = SCORES[1],
        recipe: str = "jackpot",
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        growth: float | None = None,
        temperature: float | None = None,
        hardening: float | None = None,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        swap_limit: float | None = None,
        schedule: Callable[[float], float] = cosine,
        adapt_norm: bool = True,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
    ) -> None:
        check_unwrapped(model, ConfigListError)
        self._needs_losses = needs_losses(init, init_batches, budget, evaluator is not None)
        given = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "growth": growth,
            "temperature": temperature,
            "hardening": hardening,
        }
        self.recipe, self._initial_values = recipe_and_scores(
            recipe, method, given, swap_limit, (kept_score, pruned_score)
        )
        self._own_optimizer = optimizer
        self._schedule = schedule
        self._adapt_norm = adapt_norm
        self._budget = budget
        self._swap_limit = swap_limit
        self._init = init
        self._init_batches = init_batches
        self._is_settled = False
        self._importance: dict[ScoreGroup, Tensor] | None = None
        self._norm_hooks: list[RemovableHandle] = []
        self._ignored_before: tuple[nn.Module, Any] | None = None
        self._search: Search | None = None
        self._checkpoint: Checkpoint | None = None

        with steady_parametrizations(model):
            self._begin(model, config_list, evaluator, existed_wrappers or {}, method)

    @without_gradients
    def _begin(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None,
        existed_wrappers: dict[str, ModuleWrapper],
        method: str,
    ) -> None:
        """Wrap the model as the config list says; it is as it was if that fails."""
        config_list = check_config_list(model, config_list)
        refuse_targets_taken(model, config_list, existed_wrappers)
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self._sort_by_model_order()
        tie(self._target_spaces, self._module_wrappers)
        holders = holders_of(model)
        for wrapper in self._module_wrappers.values():
            SearchedWrapper.adopt(wrapper, holders)
        self._groups = group_targets(self._target_spaces, self._module_wrappers)
        refuse_other_readers(
            model, {str(t): t.weight for t in self._targets if isinstance(t.weight, nn.Parameter)}
        )
        if method == "supermask":
            # Drawn aside: random masks and the order of the data are those of any method.
            with torch.random.fork_rng(devices=()):
                seeds = torch.randint(1 << 62, (len(self._groups),)).tolist()
            self._groups = [
                group._replace(relax=partial(SampledMask, seed=seed))
                for group, seed in zip(self._groups, seeds, strict=True)
            ]
        for target in self._targets:
            if self._needs_losses and not isinstance(target.weight, nn.Parameter):
                raise ConfigListError(
                    f"{target} is computed by a parametrization, and init={self._init!r} takes gradients of "
                    "parameters: start from 'magnitude', 'random' or masks"
                )
        for group in self._groups:
            if self._swap_limit is not None and group.grains.rows > 1:
                raise ConfigListError(
                    f"swap_limit does not go with the sparse_pattern or internal_metric_block of {group}: "
                    "limited swaps do not keep the number of each row"
                )
        if not self._needs_losses:
            self._start()
        align_targets(self._groups, self._target_spaces, self._module_wrappers)
        # All that may be wrong with the config list has been found, and the model not been touched yet.
        self._is_settled = True
        self.wrap_model()
        if self._needs_losses:
            try:
                with torch.enable_grad():
                    self._start()
            except BaseException:
                self.unwrap_model()
                raise

    def _validate_config(self) -> None:
        """Do nothing: `check_config_list` did, and let through what NNI's schema does not know."""

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> str | None:
        """Prune single weights by default, where NNI's norm pruners prune channels."""
        return None if target_space.type is TargetType.PARAMETER else "per_channel"

    def _register_scalers(self) -> None:
        super()._register_scalers()
        for module_name, spaces in self._target_spaces.items():
            if not is_transposed(self._module_wrappers[module_name].module):
                continue
            for space in spaces.values():  # input channels come first in these weights
                if space.granularity == "out_channel":
                    space._scaler = Scaling([-1, 1], "back", -1)
                elif space.granularity == "in_channel":
                    space._scaler = Scaling([1], "back", -1)

    # -- initial masks

    def _sort_by_model_order(self) -> None:
        """Put targets in model order: NNI takes them from a set of strings, new in every process."""
        order = {n: i for i, (n, _) in enumerate(self.bound_model.named_modules(remove_duplicate=False))}
        for by_module in (self._module_wrappers, self._target_spaces):
            items = sorted(by_module.items(), key=lambda item: order[item[0]])
            by_module.clear()
            by_module.update(items)

    @property
    def _targets(self) -> list[ScoredTarget]:
        return [target for group in self._groups for target in group.members]

    def _start(self) -> None:
        """Give every searched target its budget, its initial mask and its scores."""
        self._goals = [self._goal(group) for group in self._groups]
        if not isinstance(self._init, str):
            self._start_from_masks(self._init)
            return
        self._importance = self._rank_grains()
        budgets = budgets_of(self._groups, self._budget, self._importance)
        check_budgets(budgets)
        for group, keep in budgets.items():
            self._seed(group, group.grains.select(self._importance[group], keep))

    def _start_from_masks(self, masks: Masks) -> None:
        starts: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
        missing = {str(target) for target in self._targets}
        for (module_name, name), target in by_name(self._groups, self._target_spaces).items():
            if (mask := masks.get(module_name, {}).get(name)) is not None:
                starts[module_name][name] = mask
                missing.discard(str(target))
        if missing:
            raise MaskError(f"init has no mask for {', '.join(sorted(missing))}")
        self.update_masks(starts)

    def _rank_grains(self) -> dict[ScoreGroup, Tensor]:
        """Return the importance of every grain by the initial criterion."""
        weights: dict[Any, Tensor] = {target: target.weight for target in self._targets}
        losses = None
        if self._needs_losses:
            names = self._get_param_names_map()
            losses = losses_of(
                self.evaluator, self.bound_model, names, list(weights.values()), self._init_batches
            )
        importance = CRITERIA.find(str(self._init))(weights, losses)
        return {group: group.pool(importance) for group in self._groups}

    def _seed(self, group: ScoreGroup, kept: Tensor) -> None:
        group.seed(kept, *self._initial_values)
        group.limit_swaps(self._swap_limit)

    # -- wrapping

    def wrap_model(self) -> None:
        """Wrap the model and freeze it: only scores take gradients."""
        if not self._is_settled:  # NNI's constructor wraps before anything has been looked at
            return
        if self._is_wrapped:
            _logger.warning("The model is wrapped already, there is nothing to wrap.")
            return
        parameters = names_of_all(self.bound_model)
        self._takes_gradient = {name: p.requires_grad for name, p in parameters.items()}
        self._ids = {name: id(parameter) for name, parameter in parameters.items()}
        try:
            super().wrap_model()
            self._freeze()
            self._spare_ddp()
            if not self._adapt_norm:
                self._hold_statistics()
        except BaseException:
            self._release()
            raise

    def _spare_ddp(self) -> None:
        """Have DistributedDataParallel not send masks and frozen weights at every step, as it does buffers.

        Each process makes its masks from its scores, which are the same in all of them.
        """
        model = self.bound_model
        is_distributed = isinstance(model, DistributedDataParallel)
        inner = model.module if is_distributed else model
        before = getattr(inner, _DDP_IGNORES, None)
        self._ignored_before = (inner, before)
        names = set(before or ())
        for target in self._targets:
            module_name = target.module_name.removeprefix("module." if is_distributed else "")
            names.add(f"{module_name}._nni_wrapper.{target.name}_mask")
        setattr(inner, _DDP_IGNORES, names)

    def _get_param_names_map(self) -> dict[str, str]:
        """Return the names of parameters now by those they had before, for NNI's evaluators."""
        now = {id(parameter): name for name, parameter in self.bound_model.named_parameters()}
        before = {name: now[i] for name, i in self._ids.items() if i in now}
        return {**super()._get_param_names_map(), **before}

    def _freeze(self) -> None:
        # Only what the model came with: a quantizer of the same chain may have scales to train.
        for name, parameter in self.bound_model.named_parameters():
            if name.replace("_nni_wrapper.", "") in self._takes_gradient:
                parameter.requires_grad_(False)

    def _unfreeze(self) -> None:
        for name, parameter in self.bound_model.named_parameters():
            takes = self._takes_gradient.get(name.replace("_nni_wrapper.", ""), parameter.requires_grad)
            parameter.requires_grad_(takes)

    def _hold_statistics(self) -> None:
        self._norm_hooks += freeze_stats(self.bound_model)

    def unwrap_model(self) -> None:
        """Give the model back: its own modules, all weights bit for bit, gradients where it took them."""
        if not self._is_wrapped:
            _logger.warning("The model is not wrapped, there is nothing to unwrap.")
            return
        self._release()

    def _release(self) -> None:
        """Give back what wrapping has taken, as far as it has come."""
        _remove(self._norm_hooks)
        for wrapper in self._module_wrappers.values():
            if hasattr(wrapper.module, "_nni_wrapper"):
                wrapper.unwrap()
        self._is_wrapped = False
        if self._ignored_before is not None:
            inner, before = self._ignored_before
            delattr(inner, _DDP_IGNORES)
            if before is not None:
                setattr(inner, _DDP_IGNORES, before)
            self._ignored_before = None
        self._unfreeze()

    # -- masks and scores

    def score_parameters(self) -> list[nn.Parameter]:
        """Return the scores in model order, one parameter for each target or dependency group: what to train.

        The masks follow them by themselves, whoever changes them.
        """
        return [group.score for group in self._groups]

    @property
    def flips(self) -> int:
        """How many weights changed sides the last time the masks followed the scores."""
        by_device: dict[torch.device, int | Tensor] = defaultdict(int)
        for target in self._targets:
            by_device[target.score.device] += target.relaxed.flips
        return sum(map(int, by_device.values()))

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last search step; 0 before the first."""
        return self._search.learning_rate if self._search else 0.0

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of the masks as they stand, ``{module: {target: mask}}``, in model order."""
        self._refresh_masks()
        # Plain dicts, so that a file of them loads with torch's weights_only.
        return {module_name: dict(masks) for module_name, masks in super().get_masks().items()}

    def _refresh_masks(self) -> None:
        for wrapper in self._module_wrappers.values():
            refresh_masks(wrapper)

    def generate_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return the masks as they stand (NNI's name): those of the start, or those that were found."""
        return self.get_masks()

    def update_masks(self, masks: Masks) -> None:
        """Take over masks: as the masks of their targets, as the budgets, and as the start of the search.

        Raises
        ------
        MaskError
            If a mask is for a target that this pruner has not, or has not the target's shape.
        NothingKeptError
            If a mask keeps nothing.
        """
        for group, kept in kept_by(masks, self._groups, self._target_spaces).items():
            self._seed(group, kept)
        searched = by_name(self._groups, self._target_spaces)
        rest: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
        for module_name, module_masks in masks.items():
            for name, mask in module_masks.items():
                if (module_name, name) not in searched:
                    rest[module_name][name] = mask
        super().update_masks(rest)

    def reestimate_norm(self, batches: Any) -> None:
        """Estimate batch-norm statistics anew, under the masks as they stand, by one pass over ``batches``.

        Parameters
        ----------
        batches
            Iterable of input batches, of dicts, or of lists and tuples that begin with the inputs
            (`modules.batches.call_model`). Under `torch.distributed` the statistics are the mean over
            those of all ranks.

        Raises
        ------
        CalibrationError
            If there is no batch, or the model fails on one; the statistics are then as they were.
        """
        _remove(self._norm_hooks)
        try:
            reestimate(self.bound_model, batches)
        finally:
            if not self._adapt_norm:
                self._hold_statistics()

    # -- search

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Search for the given time through the evaluator, and return the wrapped model and its masks.

        The search follows its schedule over ``max_steps``. With ``max_epochs`` alone, a `TorchEvaluator`
        trains one epoch at a time; in the first, whose length is not known yet, rate and zeros stay as at the
        start. Without an evaluator nothing is searched, and the masks are returned as they are.

        Raises
        ------
        SearchDivergedError
            If the loss or a score becomes NaN or infinite; the pruner keeps the last masks that gave a
            finite loss.
        NothingSearchedError
            If the loop takes no step, or the loss of the first step does not depend on a target's mask.
        """
        if self.evaluator is None:
            if max_steps is not None or max_epochs is not None:
                raise ValueError(
                    "a search needs an evaluator: LotteryJackpotPruner(model, config_list, evaluator); "
                    "without one, train score_parameters() yourself and call compress() for the masks"
                )
            return self.bound_model, self.get_masks()
        max_steps, max_epochs = check_length("max_steps", max_steps), check_length("max_epochs", max_epochs)
        if max_steps is None and max_epochs is None:
            raise ValueError("say how long to search: compress(max_steps, max_epochs)")
        return super().compress(max_steps, max_epochs)

    def checkpoint_to(
        self,
        path: str | os.PathLike[str],
        every: int = 500,
        settings: Mapping[str, Any] | None = None,
        keep: bool = False,
        minutes: float = 5.0,
        beside: Stateful | None = None,
    ) -> None:
        """Have `compress` keep a file of how far it has come, and go on from it when it is called again.

        Run the interrupted script again as it was: the search ends with the masks it would have had, bit for
        bit on one device. The training loop is taken through its steps up to the checkpoint without forward
        and backward passes, which brings its loaders, schedulers and random numbers to their places. If
        training steps draw random numbers (dropout) or return more than a loss, the forward passes are done
        once more. A training step must keep no state of its own. The file is removed when the search is over.

        Parameters
        ----------
        path
            The file, about as large as scores, masks and the optimizer's state; written aside and renamed.
        every
            Steps of the search from one writing to the next.
        settings
            What else the search depends on, by name: a file that was written under others is refused.
            Weights, targets, length and optimizer are compared in any case. Paths, enumerations, dates,
            dataclasses and NumPy's numbers are compared as plain data.
        keep
            Whether the file stays instead, for what comes next to be interrupted too: the search that is
            begun again, by a pruner made anew and of the same ``max_steps``, is then over at once.
        minutes
            Time from one writing to the next where ``every`` steps take longer.
        beside
            What is to go on as well, such as a log: its state is that at the end of the loss's computation.

        Raises
        ------
        CheckpointError
            If a setting is something that a file cannot hold. By `compress`, before it trains: if the file is
            damaged or of another search.
        OutputFolderError
            If the folder cannot be written.
        """
        if every < 1:
            raise ValueError(f"every must be positive, got {every}")
        if not minutes > 0:
            raise ValueError(f"minutes must be positive, got {minutes}")
        self._checkpoint = Checkpoint(path, every, settings or {}, keep, minutes, beside)

    @property
    def resumed_step(self) -> int:
        """Step of the search from which `compress` has gone on; 0 if it began anew."""
        return self._checkpoint.resumed_step if self._checkpoint else 0

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        finally:
            if self.evaluator.model is not None:  # the search was cut short
                self.evaluator.unbind_model()

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._freeze()  # another compressor may have wrapped the model anew
        if not self._adapt_norm and not self._norm_hooks:
            self._hold_statistics()
        # With an interval it is NNI that schedules sparse ratios.
        recipe = self.recipe if self.interval_steps is None else self.recipe.steady()
        growth = Growth(self._pools(), recipe)
        self._search = Search(
            self.bound_model,
            self._groups,
            self._make_optimizer(),
            self._initial_values,
            self._schedule,
            self._swap_limit,
            growth,
            self._follow_goals,
            self._checkpoint,
        )
        self._follow_goals()
        if self.interval_steps is None:
            self._importance = None  # no budget will change: 4 bytes a weight less
        self._search.prepare(EvaluatorLoop(evaluator))

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if not self._is_wrapped:  # another compressor of the chain wraps and unwraps
            _remove(self._norm_hooks)
            self._unfreeze()

    def _make_optimizer(self) -> Optimizer:
        if self._own_optimizer is not None:
            return self._own_optimizer(self.score_parameters())
        return self.recipe.optimizer([[group.score for group in pool] for pool in self._pools()])

    def _pools(self) -> list[list[ScoreGroup]]:
        return pools_of(self._groups, self._budget)

    def _goal(self, group: ScoreGroup) -> tuple[float | None, ...]:
        return tuple(group.space.setting.get(key) for key in _GOALS)

    def _follow_goals(self) -> None:
        """Change budgets where a scheduled pruner (NNI's AGPPruner) has changed sparse ratios."""
        goals = [self._goal(group) for group in self._groups]
        if goals == self._goals:
            return
        self._goals = goals
        if self._importance is None:
            raise ConfigListError(
                "sparse ratios cannot be scheduled where the search starts from given masks, nor after a "
                "search without a schedule"
            )
        for group, keep in budgets_of(self._groups, self._budget, self._importance).items():
            group.resize(keep, self._importance[group])


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
