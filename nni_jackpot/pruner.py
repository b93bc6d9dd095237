"""The NNI pruner: config list and evaluator in, masks out, and not one weight changed."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.tools.utils import is_active_target
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils.hooks import RemovableHandle

from nni_jackpot.budget import as_configured, by_global_rank
from nni_jackpot.config_list import ConfigList, check_config_list
from nni_jackpot.criteria import CRITERIA
from nni_jackpot.errors import MaskError, NothingKeptError, SearchDivergedError
from nni_jackpot.masks import Masks
from nni_jackpot.schedule import SearchClock, cosine
from nni_jackpot.selection import keep_top
from nni_jackpot.targets import ScoredTarget, drop_masked_weights, keep_statistics

_logger = logging.getLogger(__name__)


class LotteryJackpotPruner(Pruner):
    """Find a lottery jackpot: a sparse sub-network of a pre-trained network with frozen weights (Eq. 8).

    Masks start from a pruning criterion and follow scores, one a weight, which edge-popup trains (Eq. 4-6).
    A target of k weights at sparse ratio p has exactly ``int(p * k)`` zeros at every moment. All parameters
    of the model are frozen while it is wrapped; `unwrap_model` gives it back as it came, bit for bit.

    Parameters
    ----------
    model
        Pre-trained model. It is wrapped at once, with the initial masks live.
    config_list
        `NNI's config list <https://nni.readthedocs.io/en/stable/compression/config_list.html>`__. Single
        weights are searched (fine-grained) at each target's ``sparse_ratio``. Targets of one
        ``global_group_id`` are ranked together by initial importance; that fixes each one's budget, within
        which it is then searched. Biases stay whole unless they have a sparse ratio of their own.
    evaluator
        NNI's evaluator; `compress` searches through its training loop. Without one, train
        `score_parameters` in a loop of your own.
    init
        Criterion of the initial masks: ``"magnitude"`` or ``"random"``.
    kept_score, pruned_score
        Initial scores of kept and of pruned weights (Sec. 4.1).
    lr, momentum, weight_decay
        Of the search's SGD (Sec. 4.1).
    optimizer
        Makes another optimizer from the list of scores; replaces the SGD and its three settings. Its learning
        rates are those at the start of the schedule.
    schedule
        Factor of the learning rate at a progress in [0, 1]; half a cosine by default (Sec. 4.1).
    adapt_norm
        Whether normalisation statistics adapt to the masks in train mode, as in the paper. If not, layers
        that track statistics use them as they are, in train mode too, and never change them.
    existed_wrappers
        Used by `from_compressor`.

    Raises
    ------
    JackpotError
        One of its kinds (`nni_jackpot.errors`) for a config list that does not fit the model; the model is
        then as it was.

    Examples
    --------
    >>> pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}], evaluator)
    >>> model, masks = pruner.compress(max_steps=None, max_epochs=10)
    >>> pruner.unwrap_model()
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        init: str = "magnitude",
        kept_score: float = 1.0,
        pruned_score: float = 0.95,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        schedule: Callable[[float], float] = cosine,
        adapt_norm: bool = True,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
    ) -> None:
        if init not in CRITERIA:
            raise ValueError(f"init must be one of {', '.join(CRITERIA)}, got {init!r}")
        if not math.isfinite(kept_score) or not pruned_score < kept_score:
            raise ValueError(f"kept_score {kept_score} must be finite and above pruned_score {pruned_score}")
        self._make_optimizer = optimizer or (
            lambda scores: SGD(scores, lr=lr, momentum=momentum, weight_decay=weight_decay)
        )
        self._schedule = schedule
        self._initial_values = (kept_score, pruned_score)
        self._adapt_norm = adapt_norm
        self._targets: list[ScoredTarget] = []
        self._hooks: list[RemovableHandle] = []
        self._norm_hooks: list[RemovableHandle] = []
        self._search_optimizer: Optimizer | None = None
        self._clock = SearchClock(None, None)

        config_list = check_config_list(model, config_list)
        super().__init__(model, config_list, evaluator, existed_wrappers)
        try:
            self._sort_by_model_order()
            self._start_from(init)
        except BaseException:
            self.unwrap_model()
            raise

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> None:
        """Prune single weights by default, where NNI's norm pruners prune channels."""
        return None

    # -- initial masks

    def _sort_by_model_order(self) -> None:
        """Put targets in model order: NNI takes them from a set of strings, new in every process."""
        order = {n: i for i, (n, _) in enumerate(self.bound_model.named_modules(remove_duplicate=False))}
        for by_module in (self._module_wrappers, self._target_spaces):
            items = sorted(by_module.items(), key=lambda item: order[item[0]])
            by_module.clear()
            by_module.update(items)

    def _start_from(self, init: str) -> None:
        """Give every active target its budget, its initial mask and its scores."""
        self._targets = [
            ScoredTarget(module_name, name, space)
            for module_name, spaces in self._target_spaces.items()
            for name, space in spaces.items()
            if is_active_target(space)
        ]
        importance = CRITERIA[init]({target: target.weight for target in self._targets})
        for target, keep in self._budgets(importance).items():
            if keep == 0:
                raise NothingKeptError(
                    f"none of the {target.weight.numel()} weights of {target} would be kept at sparse_ratio "
                    f"{target.space.sparse_ratio}: lower it, exclude {target.module_name} from the config "
                    "list, or take it out of its global_group_id"
                )
            target.seed(keep_top(importance[target], keep), *self._initial_values)

    def _budgets(self, importance: dict[Any, Tensor]) -> dict[ScoredTarget, int]:
        """Return how many weights each target keeps, each global group ranked as a whole."""
        groups: dict[Any, list[ScoredTarget]] = defaultdict(list)
        for target in self._targets:
            group = target.space.global_group_id
            groups[target if group is None else group].append(target)
        budgets: dict[ScoredTarget, int] = {}
        for members in groups.values():
            rule = as_configured if members[0].space.global_group_id is None else by_global_rank
            budgets |= rule({target: importance[target] for target in members}, members[0].space.sparse_ratio)
        return {target: budgets[target] for target in self._targets}

    # -- wrapping

    def wrap_model(self) -> None:
        """Wrap the model and freeze it: only scores take gradients."""
        if self._is_wrapped:
            _logger.warning("The model is wrapped already, there is nothing to wrap.")
            return
        self._takes_gradient = {name: p.requires_grad for name, p in self.bound_model.named_parameters()}
        super().wrap_model()
        self._freeze()
        for module_name in self._target_spaces:
            module = self._module_wrappers[module_name].module
            drop_masked_weights(module, None, None)  # NNI's clone of the weights is never read: share them
            self._hooks.append(module.register_forward_hook(drop_masked_weights))
        if not self._adapt_norm:
            self._hold_statistics()

    def _freeze(self) -> None:
        scores = {id(score) for score in self.score_parameters()}
        for parameter in self.bound_model.parameters():
            parameter.requires_grad_(id(parameter) in scores)

    def _hold_statistics(self) -> None:
        for module in self.bound_model.modules():
            if getattr(module, "running_mean", None) is not None:
                self._norm_hooks.append(module.register_forward_pre_hook(keep_statistics))

    def unwrap_model(self) -> None:
        """Give the model back: its own modules, all weights bit for bit, gradients where it took them."""
        if not self._is_wrapped:
            _logger.warning("The model is not wrapped, there is nothing to unwrap.")
            return
        _remove(self._hooks)
        _remove(self._norm_hooks)
        super().unwrap_model()
        for name, parameter in self.bound_model.named_parameters():
            parameter.requires_grad_(self._takes_gradient.get(name, parameter.requires_grad))

    # -- masks and scores

    def score_parameters(self) -> list[nn.Parameter]:
        """Return the scores, one parameter a target, in model order: what an optimizer of the search trains.

        The masks follow them by themselves, whoever changes them.
        """
        return [target.score for target in self._targets]

    @property
    def flips(self) -> int:
        """How many weights changed sides the last time the masks followed the scores."""
        return sum(target.relaxed.flips for target in self._targets)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last search step; 0 before the first."""
        return self._search_optimizer.param_groups[0]["lr"] if self._search_optimizer else 0.0

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of the masks as they stand, ``{module: {target: mask}}``, in model order."""
        for target in self._targets:
            target.refresh()
        # Plain dicts, so that a file of them loads with torch's weights_only.
        return {module_name: dict(masks) for module_name, masks in super().get_masks().items()}

    def update_masks(self, masks: Masks) -> None:
        """Take over masks: as the masks of their targets, as the budgets, and as the start of the search.

        Raises
        ------
        MaskError
            If a mask is for a target that this pruner has not, or has not the target's shape.
        NothingKeptError
            If a mask keeps nothing.
        """
        searched = {(target.module_name, target.name): target for target in self._targets}
        for module_name, module_masks in masks.items():
            for name, mask in module_masks.items():
                space = self._target_spaces.get(module_name, {}).get(name)
                if space is None:
                    raise MaskError(f"{module_name}.{name} is no target of this pruner")
                if mask is not None and list(mask.shape) != space.shape:
                    shapes = f"shape {list(mask.shape)}, its target {space.shape}"
                    raise MaskError(f"the mask of {module_name}.{name} has {shapes}")
                if (module_name, name) in searched and (mask is None or not mask.any()):
                    raise NothingKeptError(f"the mask of {module_name}.{name} keeps nothing")
        rest: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
        for module_name, module_masks in masks.items():
            for name, mask in module_masks.items():
                if mask is not None and (module_name, name) in searched:
                    target = searched[module_name, name]
                    target.seed(mask.to(target.weight.device).bool(), *self._initial_values)
                else:
                    rest[module_name][name] = mask
        super().update_masks(rest)

    def reestimate_norm(self, batches: Any) -> None:
        """Estimate batch-norm statistics anew, under the masks as they stand, by one pass over ``batches``.

        Parameters
        ----------
        batches
            Iterable of input batches, or of lists and tuples that begin with one; as for
            `torch.optim.swa_utils.update_bn`, which does the work.
        """
        _remove(self._norm_hooks)
        update_bn(batches, self.bound_model, device=next(self.bound_model.parameters()).device)
        if not self._adapt_norm:
            self._hold_statistics()

    # -- search

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Search for the given time through the evaluator, and return the wrapped model and its masks.

        The learning rate follows the schedule over ``max_steps``. With ``max_epochs`` alone, the evaluator
        trains one epoch at a time; the first, whose length is not known yet, runs at the initial rate.
        Without an evaluator nothing is searched, and the masks are returned as they are.

        Raises
        ------
        SearchDivergedError
            If the loss or a score becomes NaN or infinite; the pruner keeps the last masks that gave a
            finite loss.
        """
        if self.evaluator is None:
            if max_steps is not None or max_epochs is not None:
                raise ValueError(
                    "a search needs an evaluator: LotteryJackpotPruner(model, config_list, evaluator); "
                    "without one, train score_parameters() yourself and call compress() for the masks"
                )
            return self.bound_model, self.get_masks()
        if max_steps is None and max_epochs is None:
            raise ValueError("say how long to search: compress(max_steps, max_epochs)")
        if max(max_steps or 0, max_epochs or 0) <= 0:
            raise ValueError(f"max_steps={max_steps} and max_epochs={max_epochs}: one must be positive")
        return super().compress(max_steps, max_epochs)

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
        self._search_optimizer = self._make_optimizer(self.score_parameters())
        for group in self._search_optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        evaluator.patch_loss(self._check_loss)
        evaluator.patch_optimizer_step(before_step_tasks=[self._search_step], after_step_tasks=[])
        self._patch_train(evaluator)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        pass

    def _patch_train(self, evaluator: Evaluator) -> None:
        """Learn the length of the search from the one call that knows it, whichever compressor makes it."""
        train = evaluator.train

        def timed_train(max_steps: int | None = None, max_epochs: int | None = None) -> None:
            del evaluator.train  # the patch serves this one call
            self._clock = SearchClock(max_steps, max_epochs)
            try:
                if max_steps is not None:
                    train(max_steps, max_epochs)
                else:
                    for _ in range(max_epochs or 0):
                        self._clock.begin_epoch()
                        train(None, 1)
                for target in self._targets:  # the last step, too, may have left scores that have no order
                    target.refresh()
            except SearchDivergedError as error:
                self._keep_last_good_masks()
                raise SearchDivergedError(
                    f"{error} at step {self._clock.step + 1} of the search; the pruner keeps the last masks "
                    "that gave a finite loss. Lower lr, or look at the data of that step"
                ) from error

        evaluator.train = timed_train

    def _check_loss(self, loss: Tensor, batch: Any) -> Tensor:
        if not torch.isfinite(loss).all():
            raise SearchDivergedError(f"the loss became {loss.detach().reshape(-1)[0].item()}")
        for target in self._targets:
            target.relaxed.accept()
        return loss

    def _search_step(self) -> None:
        optimizer = self._search_optimizer
        assert optimizer is not None
        factor = self._schedule(self._clock.progress())
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._clock.step += 1

    def _keep_last_good_masks(self) -> None:
        for target in self._targets:
            target.relaxed.undo(target.space.mask)
            target.seed(target.space.mask.bool(), *self._initial_values)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
