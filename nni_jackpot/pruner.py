"""The NNI pruner: config list and evaluator in, masks out, and not one weight changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_jackpot.errors import ConfigListError
from nni_jackpot.masking.budgets import Rule
from nni_jackpot.masking.criteria import Criterion
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.masked_weights import without_gradients
from nni_jackpot.masking.methods import MaskSchedule, Method
from nni_jackpot.masks import Masks, check_unwrapped
from nni_jackpot.modules.batch_norm import has_batch_norm
from nni_jackpot.modules.final_statistics import FinalStatistics
from nni_jackpot.modules.parameters import refuse_other_readers, steady_parametrizations
from nni_jackpot.modules.tuned import TunedParameters
from nni_jackpot.nni_bridge.calibration import evidence_of
from nni_jackpot.nni_bridge.config_list import ConfigList, check_config_list, refuse_targets_taken
from nni_jackpot.nni_bridge.evaluator_driver import EvaluatorLoop
from nni_jackpot.nni_bridge.grouping import align_targets, group_targets
from nni_jackpot.nni_bridge.live_mask_pruner import LiveMaskPruner
from nni_jackpot.nni_bridge.searched_targets import SearchedTargets
from nni_jackpot.search.best_masks.best_masks import DIVISOR
from nni_jackpot.search.best_masks.held_out import HeldOut
from nni_jackpot.search.checkpoint import Checkpoint
from nni_jackpot.search.clock import cosine
from nni_jackpot.search.driven_search import DrivenSearch
from nni_jackpot.search.loop import Search
from nni_jackpot.search.optimizers.normalized_sgd import optimizer_of
from nni_jackpot.search.options import budget_of, check_length, criterion_of, method_of, norm_of
from nni_jackpot.search.own_loop import OwnLoop
from nni_jackpot.search.sparsity_schedule import SparsitySchedule

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

_logger = logging.getLogger(__name__)


class LotteryJackpotPruner(LiveMaskPruner):
    """Find a lottery jackpot: a sparse sub-network of a pre-trained network with frozen weights (Eq. 8).

    Masks start from a pruning criterion and follow scores, one per weight, which are trained (Eq. 4-6). A
    target of k weights at sparse ratio p has exactly ``int(p * k)`` zeros, a global group as many in all: at
    the end, and with `EdgePopup.paper` at every step. Parameters are frozen while the model is wrapped;
    `unwrap_model` gives them back bit for bit.

    Parameters
    ----------
    model
        Pre-trained model. It is wrapped at once, with the initial masks live.
    config_list
        `NNI's config list <https://nni.readthedocs.io/en/stable/compression/config_list.html>`__. Single
        weights are searched unless a ``granularity`` asks for channels or blocks, which then have one score
        each. Targets of one ``global_group_id`` share a budget by the global rank of their initial
        importance; a ``sparse_threshold`` on the importance sets a budget as well. Targets of one
        ``dependency_group_id`` share scores and masks. Biases follow the channels of their weights
        (``align``), and stay whole where single weights are searched. Beyond NNI, ``sparse_pattern``
        (``"2:4"``) keeps N of every M weights along the input dimension.
    evaluator
        NNI's evaluator; `compress` searches through its training loop. Without one, call `begin` and train
        in a loop of your own.
    init
        Where the search starts: a criterion by name (``"magnitude"``, ``"random"``, ``"wanda"``,
        ``"sparsegpt"``, ``"snip"``, ``"taylor"``, ``"grasp"``, ``"obd"``, or one that `register_criterion`
        has added) or as a callable, or NNI masks of every searched target. Criteria that need losses or
        activations need an evaluator.
    init_batches
        Number of batches that such criteria, and budgets that need one, see.
    method
        How masks follow scores, and with which settings: `EdgePopup`, `Supermask`, `Patterns`, or the name
        of a registered method for its defaults.
    budget
        How zeros are shared out among targets without a global group: ``"as_configured"``, each target at its
        own sparse ratio; ``"global_rank"``, all targets in one ranking; ``"erdos_renyi_kernel"``, densities
        by the shapes of the weights; ``"owl"``, by the outliers among activations; ``"lamp"``, one ranking by
        relative magnitude; another registered name, or a callable. The total of zeros is the same.
    norm
        ``"adapt"``: norm statistics follow the masks, as in the paper, and end as those of the final masks.
        ``"freeze"``: layers use the statistics they have, in train mode too. That is right for channels,
        since a layer that normalizes by batch takes away the gradient of a channel's scale. ``"tune"``: as
        ``"adapt"``, and affines of norm layers and all biases are trained along (`tuned`).
    optimizer
        Returns another optimizer for a list of scores; its learning rates are those at the start.
    schedule
        Factor of the learning rate at a progress in [0, 1]; half a cosine by default (Sec. 4.1).
    existed_wrappers
        Used by `from_compressor`.
    **old
        Settings by their keywords in version 0.1 (``recipe``, ``lr``, ``growth``, ``adapt_norm``, ...), with
        a DeprecationWarning that shows the new spelling.

    Raises
    ------
    JackpotError
        One of its kinds (`nni_jackpot.errors`) for a config list that does not fit the model; the model is
        then unchanged.
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
        init: str | Criterion | Masks = "magnitude",
        init_batches: int = 1,
        method: str | Method = "edge_popup",
        budget: str | Rule = "as_configured",
        norm: str = "adapt",
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        schedule: Callable[[float], float] = cosine,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        **old: Any,
    ) -> None:
        check_unwrapped(model, ConfigListError)
        self._criterion = criterion_of(init, init_batches, evaluator is not None)
        self._budget = budget_of(budget, evaluator is not None or self._criterion is None)
        self._norm = norm_of(norm, old)
        asked = method_of(method, old)
        self.method = asked.suited_to(has_batch_norm(model))
        self._finds_lr = asked.lr is None and optimizer is None
        self._own_optimizer = optimizer
        self._schedule = schedule
        self._init_batches = init_batches
        self._held_out: int | HeldOut = 0
        self._is_settled = False
        self._search: Search | None = None
        self._checkpoint: Checkpoint | None = None

        with steady_parametrizations(model):
            self._set_up(model, config_list, evaluator, existed_wrappers or {}, init)

    @without_gradients
    def _set_up(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None,
        existed_wrappers: dict[str, ModuleWrapper],
        init: Any,
    ) -> None:
        """Wrap the model as the config list says; the model is unchanged if that fails."""
        config_list = check_config_list(model, config_list)
        refuse_targets_taken(model, config_list, existed_wrappers)
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self._adopt_wrappers()
        groups = group_targets(self._target_spaces, self._module_wrappers, self.method.parameter_class)
        spaces = self._target_spaces
        self._targets = SearchedTargets(groups, spaces, self.method, self._budget, self._criterion)
        weights = {str(p): p.weight for p in self._targets.parameters}
        refuse_other_readers(model, {k: w for k, w in weights.items() if isinstance(w, nn.Parameter)})
        self._targets.check()
        if self._criterion is None:
            self.update_masks(self._targets.start_from(init))
        elif not self._targets.needs_data:
            self._targets.start(self._evidence_of)
        align_targets(groups, spaces, self._module_wrappers)
        # The config list has been checked in full, and the model has not been touched yet.
        self._is_settled = True
        self.wrap_model()
        if self._targets.needs_data:
            try:
                with torch.enable_grad():
                    self._targets.start(self._evidence_of)
            except BaseException:
                self.unwrap_model()
                raise

    def _evidence_of(self, needs: str, weights: Mapping[MaskedParameter, Tensor]) -> Any:
        names = self._get_param_names_map()
        return evidence_of(needs, weights, self.evaluator, self.bound_model, names, self._init_batches)

    # -- search

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last search step; 0 before the first."""
        return self._search.learning_rate if self._search else 0.0

    def compress(
        self,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        norm_batches: Any = None,
        held_out: int | Callable[[], Tensor | float] = 8,
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Search through the evaluator, and return the wrapped model and its masks.

        The search follows its schedule over ``max_steps``. With ``max_epochs`` alone, a `TorchEvaluator`
        trains one epoch at a time; in the first, whose length is not known yet, learning rate and zeros stay
        as at the start. Without an evaluator nothing is searched: the current masks are returned.

        Parameters
        ----------
        max_steps, max_epochs
            Length of the search.
        norm_batches
            Batches to re-estimate batch-norm statistics with, under the final masks (`reestimate_norm`).
            Without them the statistics are the mean over the last steps, those without soft masks.
        held_out
            Number of training steps whose loss is measured again at the end, or a function as for `begin`. If
            the last masks are worse than those of the start, or the best of the search, the search ends with
            the better ones and says so. 0 for the last masks. Steps are not measured under Lightning's manual
            optimization, nor anything where other compressors take part or schedule the sparse ratios.

        Raises
        ------
        SearchDivergedError
            If the loss or a score becomes NaN or infinite; the pruner keeps the last masks that gave a finite
            loss.
        NothingSearchedError
            If the loop takes no step, or the loss of the first step does not depend on a target's mask.
        """
        if self.evaluator is None:
            if max_steps is not None or max_epochs is not None:
                raise ValueError(
                    "a search needs an evaluator: LotteryJackpotPruner(model, config_list, evaluator); "
                    "without one, call begin(total_steps) and train in a loop of your own"
                )
        else:
            max_steps = check_length("compress(): max_steps", max_steps)
            max_epochs = check_length("compress(): max_epochs", max_epochs)
            if max_steps is None and max_epochs is None:
                raise ValueError("say how long to search: compress(max_steps, max_epochs)")
            self._held_out = held_out if isinstance(held_out, int) else self._measured(held_out)
            super().compress(max_steps, max_epochs)
        return self.bound_model, self._masks_of(norm_batches)

    def begin(self, total_steps: int, held_out: Callable[[], Tensor | float] | None = None) -> OwnLoop:
        """Begin a search in a loop of your own.

        Parameters
        ----------
        total_steps
            Length of the search in steps, which its schedule follows.
        held_out
            Returns the model's loss on a few batches, always the same. With it, the search ends with the best
            of the masks that it has compared, those of the start at worst. The function is called without
            gradients, in eval mode; batch norm normalizes by batch.

        Returns
        -------
        OwnLoop
            Call its ``step()`` after each backward pass, and ``finish()`` for the masks.

        Examples
        --------
        >>> search = pruner.begin(total_steps=len(batches))
        >>> for images, labels in batches:
        ...     loss = cross_entropy(model(images), labels)
        ...     loss.backward()
        ...     search.step(loss)
        >>> masks = search.finish()
        """
        steps = check_length("begin(): total_steps", total_steps)
        if steps is None:
            raise ValueError("begin(): total_steps must be a whole number, got None")
        if not self._is_wrapped:
            raise ValueError("begin(): the model is not wrapped; call wrap_model() first")
        self._frozen.freeze()
        self._targets.forget_importance()  # 4 bytes a weight less
        search = self._make_search(held_out is not None)
        search.begin(steps)
        return OwnLoop(search, self._masks_of, None if held_out is None else self._measured(held_out))

    def _masks_of(self, norm_batches: Any) -> dict[str, dict[str, Tensor | None]]:
        if norm_batches is not None:
            self.reestimate_norm(norm_batches)
        elif self._search is not None:
            self._search.warn_of_statistics()
        return self.get_masks()

    def _measured(self, loss_of: Callable[[], Tensor | float]) -> HeldOut:
        return HeldOut(self.bound_model, self._norm != "freeze", loss_of)

    def checkpoint_to(
        self,
        path: str | os.PathLike[str],
        every: int = 500,
        settings: Mapping[str, Any] | None = None,
        keep: bool = False,
        minutes: float = 5.0,
        beside: Stateful | None = None,
    ) -> None:
        """Save a checkpoint during `compress`, and resume from it when `compress` is called again.

        Run the interrupted script again: the search ends with the masks of an uninterrupted one, bit for bit
        on one device. The training loop is replayed up to the step of the checkpoint without forward and
        backward passes, which restores loaders, schedulers and random numbers. If training steps draw random
        numbers (dropout) or return more than a loss, the replay computes the forward passes. A training step
        must not keep state between calls. The file is removed at the end of the search.

        Parameters
        ----------
        path
            The file, about as large as scores, masks and the optimizer's state together. It is replaced
            atomically.
        every
            Number of steps between two checkpoints.
        settings
            Further settings that the search depends on, by name; a file with other settings is refused.
            Weights, targets, length and optimizer are compared in any case. Paths, enumerations, dates,
            dataclasses and NumPy's numbers are compared as plain data.
        keep
            Whether to keep the file at the end, for work after the search that may be interrupted too.
            Rerunning with a new pruner and the same ``max_steps`` then returns immediately.
        minutes
            Time between two checkpoints, if ``every`` steps take longer.
        beside
            An object whose state is saved and restored along with the search, such as a log.

        Raises
        ------
        CheckpointError
            If a file cannot hold a setting. By `compress`, before it trains, if the file is damaged or
            belongs to another search.
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
        """Step that `compress` has resumed from; 0 if it began from the start."""
        return self._checkpoint.resumed_step if self._checkpoint else 0

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._frozen.freeze()  # another compressor may have re-wrapped the model
        is_alone = self.interval_steps is None and len(self.fused_compressors) == 1
        held_out = self._held_out if is_alone else 0
        search = self._make_search(bool(held_out))
        self._targets.follow_goals()
        if self.interval_steps is None:
            self._targets.forget_importance()  # 4 bytes a weight less
        DrivenSearch(
            search,
            EvaluatorLoop(evaluator),
            self.bound_model,
            self._targets.follow_goals,
            self._checkpoint,
            held_out,
            self._norm != "freeze",
        ).prepare()

    def _make_search(self, compares: bool) -> Search:
        budget_groups = self._targets.budget_groups
        # With an interval NNI schedules the sparse ratios.
        settings = self.method.schedule
        if self.interval_steps is not None:
            settings = MaskSchedule(swap_limit=settings.swap_limit)
        finds_lr = self._finds_lr and not settings.ramp_end and not settings.temperature
        method = self.method
        if finds_lr and not compares and method.lr is not None:  # nothing would show harm
            method = replace(method, lr=method.lr / DIVISOR)
        scores = [[group.score for group in members] for members in budget_groups]
        own = self._own_optimizer
        optimizer = own(self.score_parameters()) if own else optimizer_of(method, scores)
        # After soft masks, the running statistics are still theirs.
        collects = self._norm != "freeze" and settings.temperature > 0
        self._search = Search(
            self._targets.groups,
            optimizer,
            SparsitySchedule(budget_groups, settings),
            self._schedule,
            self.method,
            FinalStatistics(self.bound_model) if collects else None,
            finds_lr,
            compares,
            TunedParameters(self._frozen.tuned) if self._frozen.tuned else None,
        )
        return self._search
