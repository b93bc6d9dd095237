"""What a search keeps in NNI's module wrappers: scores, relaxed masks, and the hooks that use them.

Hooks and apply methods stand at module level and find what they need in the wrapper, so that a wrapped model
can be copied, pickled and moved to another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from nni.compression.base.apply_method import mul_mask, pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_jackpot.edge_popup import RelaxedMask, Target, initial_scores
from nni_jackpot.granularity import Grains
from nni_jackpot.supermask import SampledMask
from nni_jackpot.together import refresh_together, wait_together

_SCORE = "{}_score"
_RELAXED = "{}_relaxed_mask"
_APPLY_METHOD = "jackpot_mul"
_ALIGNED = "{}_aligned_mask"
_PLAIN_MODULES = (nn.Linear, nn.modules.conv._ConvNd)


class LeanSpace(PruningTargetSpace):
    """A target space that hands out its settings themselves: NNI copies all of them whenever one is read."""

    @property
    def setting(self) -> dict[str, Any]:
        """The settings, which a forward reads several times."""
        return self._setting


class SearchedSpace(LeanSpace):
    """A target space whose mask takes a byte a weight, not four; NNI reads it as numbers, in a copy."""

    @property
    def mask(self) -> Tensor | None:
        """The mask as numbers of the target's type, 0 and 1."""
        mask = raw_mask(self)
        return None if mask is None else mask.to(self.target.dtype)

    @mask.setter
    def mask(self, value: Tensor | None) -> None:
        mask = raw_mask(self)
        if mask is None or value is None:
            self._set_wrapper_attr(self._mask_name, None if value is None else value.bool())
        else:
            mask.copy_(value)


def raw_mask(space: PruningTargetSpace) -> Tensor:
    """Return the mask itself, as it lies in the wrapper."""
    return space._wrapper._buffers[space._mask_name]


class SearchedWrapper(ModuleWrapper):
    """A wrapper that does no more in a forward than to give its module the masked weights.

    NNI's also binds the module's arguments anew, copies masks, settings and frozen biases, and empties the
    allocator's cache on a GPU, at every call.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; as NNI does it where others than a search have a hand in it."""
        others = (
            self.quantization_target_spaces or self.distillation_target_spaces or self.fused_modules
        ) or any(space.type is not TargetType.PARAMETER for space in self.pruning_target_spaces.values())
        if others or getattr(self, "is_bias_correction", False):
            return super().forward(*args, **kwargs)
        # Into the buffers, where wrapping has put them: to set an attribute of a module takes as long as
        # to launch a kernel.
        buffers = self.module._buffers
        for name, space in self.pruning_target_spaces.items():
            weight, score = self._parameters.get(name), self._parameters.get(_SCORE.format(name))
            if weight is not None and score is not None and space.apply_method == _APPLY_METHOD:
                buffers[name] = _masked_weight(self, name, weight, score)
            elif name in buffers:
                buffers[name] = self.patch_helper(name, space.target)
        return self.module_forward(*args, **kwargs)

    def _apply_mask_helper(self, target: Any, target_space: PruningTargetSpace) -> Any:
        if isinstance(target_space, SearchedSpace):
            return pruning_apply_methods[target_space.apply_method](target, target_space)
        is_whole = target_space.type is TargetType.PARAMETER and target_space.mask is None
        if is_whole and target is not None and not target.requires_grad:
            return target.detach()
        return super()._apply_mask_helper(target, target_space)


class ScoredTarget(NamedTuple):
    """A pruning target that is searched: a weight, its score, and the mask that follows the score."""

    module_name: str
    name: str
    space: PruningTargetSpace
    grains: Grains

    def __str__(self) -> str:
        return f"{self.module_name}.{self.name}"

    @property
    def weight(self) -> Tensor:
        """The frozen weights."""
        return self.space.target

    @property
    def mask(self) -> Tensor:
        """The mask, boolean, of the target's shape; up to date once it has been refreshed."""
        return raw_mask(self.space)

    @property
    def score(self) -> nn.Parameter:
        """The scores, one a grain; targets of one dependency group have them in common."""
        return self.space._wrapper._parameters[_SCORE.format(self.name)]

    @property
    def relaxed(self) -> RelaxedMask:
        """What keeps the mask in step with the scores."""
        return getattr(self.space._wrapper, _RELAXED.format(self.name))

    @property
    def parts(self) -> Target:
        """What is refreshed together with others."""
        return self.relaxed, self.score, self.mask


class ScoreGroup(NamedTuple):
    """Targets with one set of scores: a single target, or those of one ``dependency_group_id``.

    All members have the same number of grains, in the same rows, and keep the same ones. ``relax`` makes what
    keeps a member's mask in step with the scores.
    """

    members: tuple[ScoredTarget, ...]
    relax: Callable[[Grains, int], RelaxedMask] = RelaxedMask

    def __str__(self) -> str:
        return " + ".join(map(str, self.members))

    @property
    def space(self) -> PruningTargetSpace:
        """The first member's target space, which has the settings that all members share."""
        return self.members[0].space

    @property
    def grains(self) -> Grains:
        """The first member's grains."""
        return self.members[0].grains

    @property
    def score(self) -> nn.Parameter:
        """The scores, of the first member's score shape."""
        return self.members[0].score

    def pool(self, importance: Mapping[Any, Tensor]) -> Tensor:
        """Return the importance of every grain: the mean over its weights, averaged over the members."""
        pooled = [
            t.grains.pool(importance[t], lambda weights: weights.mean(-1)).reshape(self.grains.score_shape)
            for t in self.members
        ]
        return pooled[0] if len(pooled) == 1 else torch.stack([p.to(pooled[0]) for p in pooled]).mean(0)

    def seed(self, kept: Tensor, kept_score: float, pruned_score: float) -> None:
        """Set the masks (boolean ``kept``, one a grain), the budget, and the scores that stand for them."""
        scores = initial_scores(kept, kept_score, pruned_score, self.members[0].weight.dtype)
        name = _SCORE.format(self.members[0].name)
        if hasattr(self.space._wrapper, name):
            with torch.no_grad():
                self.score.copy_(scores)
        else:
            parameter = nn.Parameter(scores)
            for target in self.members:
                target.space._wrapper.register_parameter(_SCORE.format(target.name), parameter)
        for target in self.members:
            mask = target.grains.expand(kept.view(target.grains.score_shape))
            if not isinstance(target.space, SearchedSpace):
                target.space.mask = None
                target.space.__class__ = SearchedSpace
            target.space.mask = mask.to(target.weight.device).expand(target.grains.shape).clone()
            relaxed = self.relax(target.grains, int(kept.sum()))
            relaxed.settle(target.score)  # the mask is what these scores ask for
            setattr(target.space._wrapper, _RELAXED.format(target.name), relaxed)
            if target.space.apply_method != "bypass":
                target.space.apply_method = _APPLY_METHOD

    def limit_swaps(self, share: float | None) -> None:
        """Let a refresh replace no more than this share of the kept grains; None for any number."""
        for target in self.members:
            target.relaxed.swap_limit = None if share is None else math.ceil(share * target.relaxed.keep)

    def soften(self, temperature: float) -> None:
        """Let training see soft masks of this temperature from the next refresh on; 0 for the masks."""
        for target in self.members:
            target.relaxed.soften(temperature)

    def tell(self, is_told: bool) -> None:
        """Say whether `refresh_scored` will be called after every change of the scores."""
        for target in self.members:
            target.relaxed.is_told = is_told

    def accept(self) -> None:
        """Note that the masks have proven good, so that `undo` goes back no further."""
        for target in self.members:
            target.relaxed.accept()

    def undo(self, kept_score: float, pruned_score: float) -> None:
        """Go back to the masks that were accepted last, and to scores that stand for them."""
        for target in self.members:
            target.relaxed.undo(target.mask)
        self.seed(self.grains.of_mask(self.members[0].mask), kept_score, pruned_score)

    @property
    def weights(self) -> int:
        """How many weights the grains stand for, over all members."""
        return self.grains.count * sum(target.grains.size for target in self.members)

    @property
    def keep(self) -> int:
        """How many grains the first member, and every other, keeps."""
        return self.members[0].relaxed.keep

    def aim_at(self, keep: int) -> None:
        """Keep another number of grains from the next refresh on."""
        for target in self.members:
            target.relaxed.keep = keep

    def resize(self, keep: int, importance: Tensor) -> None:
        """Keep another number of grains from now on; among equal scores those of largest importance."""
        favoured = self.grains.select(importance, keep)
        for target in self.members:
            shaped = favoured.view(target.grains.score_shape)
            target.relaxed.resize(keep, target.score, target.mask, shaped)


def remake_values(groups: Iterable[ScoreGroup]) -> None:
    """Make the masked weights of a search anew, where scores and masks have been put in their places."""
    targets = [target for group in groups for target in group.members]
    wait_together(target.parts for target in targets if target.relaxed.can_wait)
    for target in targets:
        target.relaxed.make(target.weight, target.score, target.mask)


def refresh_scored(groups: Iterable[ScoreGroup]) -> None:
    """Bring the masks of groups that training sees up to date with their scores, all at once.

    Raises
    ------
    SearchDivergedError
        If a score is NaN.
    """
    waiting: list[Target] = []
    seen: list[Target] = []
    for target in (target for group in groups for target in group.members):
        (waiting if target.relaxed.can_wait else seen).append(target.parts)
    wait_together(waiting)
    refresh_together(seen)


def _jackpot_mul(weight: Tensor, target_space: PruningTargetSpace) -> Tensor:
    """NNI's apply method of a searched target: the masked weights, with gradients for its scores."""
    wrapper, name = target_space._wrapper, target_space._target_name
    score = wrapper._parameters.get(_SCORE.format(name))
    return mul_mask(weight, target_space) if score is None else _masked_weight(wrapper, name, weight, score)


def _masked_weight(wrapper: ModuleWrapper, name: str, weight: Tensor, score: nn.Parameter) -> Tensor:
    """Return the masked weights of a searched target, or of a sample where training sees one."""
    # The gradients of these modules' weights are made for nobody else.
    may_write = isinstance(wrapper.module, _PLAIN_MODULES) and not wrapper.quantization_target_spaces
    relaxed, mask = wrapper.__dict__[_RELAXED.format(name)], raw_mask(wrapper.pruning_target_spaces[name])
    # Not without gradients, as where normalisation statistics are estimated for the masks as they stand.
    samples = isinstance(relaxed, SampledMask) and wrapper.module.training and torch.is_grad_enabled()
    return (relaxed.sample if samples else relaxed.apply)(weight, score, mask, may_write)


pruning_apply_methods[_APPLY_METHOD] = _jackpot_mul


class AlignedMask:
    """Keeps the mask of a target in step with another target's (NNI's ``align``).

    Parameters
    ----------
    source
        Target space whose mask is followed.
    dims
        Dimensions of the source's mask that the target has; where all others are zero, the target is.
    """

    def __init__(self, source: PruningTargetSpace, dims: tuple[int, ...]) -> None:
        self.source = source
        self.dims = dims
        self._seen: tuple[int, int] | None = None

    def _kept(self) -> Tensor:
        """Return where the source keeps anything, boolean, one dimension for each of ``dims``."""
        mask = raw_mask(self.source).bool()
        dims = {dim % mask.dim() for dim in self.dims}
        others = [dim for dim in range(mask.dim()) if dim not in dims]
        return mask.any(dim=others) if others else mask

    def refresh(self, space: PruningTargetSpace) -> None:
        """Let the mask of ``space`` follow; an input or output, once its shape has been seen."""
        _refresh(self.source)
        mask = raw_mask(self.source)
        seen = (id(mask), mask._version)
        if space.shape is None or (seen == self._seen and space.mask is not None):
            return
        kept = self._kept()
        if space._scaler is not None:
            whole = space._scaler.expand(kept, space.shape)
            grains = space._scaler.shrink(whole, lambda values: values.any(-1), keepdim=True)
            kept = space._scaler.expand(grains, space.shape, keepdim=True, full_expand=False)
        with torch.no_grad():
            space.mask = kept.to(self.source.target.dtype)
        self._seen = seen


def align(space: PruningTargetSpace, source: PruningTargetSpace, dims: tuple[int, ...]) -> None:
    """Have the mask of ``space`` follow that of ``source`` from now on, before every use."""
    setattr(space._wrapper, _ALIGNED.format(space._target_name), AlignedMask(source, dims))
    _refresh(space)


def keep_masks_fresh(wrapper: ModuleWrapper) -> None:
    """See to it that masks of a wrapper are up to date before they are applied or saved; once a wrapper."""
    if type(wrapper) is ModuleWrapper:
        wrapper.__class__ = SearchedWrapper
    for space in wrapper.pruning_target_spaces.values():
        if type(space) is PruningTargetSpace:
            space.__class__ = LeanSpace
    wrapper.register_track_func(_refresh_before_use)
    wrapper.register_state_dict_pre_hook(refresh_masks)


def _refresh_before_use(wrapper: ModuleWrapper, target_name: str, target: Any) -> None:
    """Serve NNI's tracking of targets, which comes right before a mask is applied."""
    if hasattr(wrapper, _ALIGNED.format(target_name)):
        _refresh(wrapper.pruning_target_spaces[target_name])


def _refresh(space: PruningTargetSpace) -> None:
    """Bring a mask up to date, whatever it follows."""
    wrapper, name = space._wrapper, space._target_name
    if (aligned := getattr(wrapper, _ALIGNED.format(name), None)) is not None:
        aligned.refresh(space)
    elif (score := getattr(wrapper, _SCORE.format(name), None)) is not None:
        getattr(wrapper, _RELAXED.format(name)).refresh(score, raw_mask(space))


def refresh_masks(wrapper: ModuleWrapper, *state_dict_arguments: Any) -> None:
    """Bring all masks of a wrapper up to date; also before a state dict is taken."""
    for space in wrapper.pruning_target_spaces.values():
        _refresh(space)


def share_weights(space: PruningTargetSpace) -> None:
    """Have a wrapper share its weights with the module's own parameter, of which NNI gives it a copy.

    The module's goes when it is wrapped, but the user's optimizer still holds it, and would hold it twice.
    """
    own = space._wrapper.module._parameters.get(space._target_name)
    if own is not None and space.type is TargetType.PARAMETER:
        space.target.data = own.data


def drop_masked_weights(module: nn.Module, args: Any, output: Any) -> None:
    """After a forward: share the frozen weights with the module.

    NNI leaves the masked weights there, with their graph, which can neither be copied nor pickled.
    """
    wrapper: Any = getattr(module, "_nni_wrapper", None)
    if wrapper is None:  # unwrapped by another compressor of a chain
        return
    for name in wrapper.pruning_target_spaces:
        if (own := wrapper._parameters.get(name)) is not None:
            module._buffers[name] = own.detach()
