"""What a search keeps in NNI's module wrappers: scores, relaxed masks, and the hooks that use them.

Hooks and apply methods stand at module level and find what they need in the wrapper, so that a wrapped model
can be copied, pickled and moved to another device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from nni.compression.base.apply_method import mul_mask, pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_jackpot.edge_popup import RelaxedMask, initial_scores

_SCORE = "{}_score"
_RELAXED = "{}_relaxed_mask"


class ScoredTarget(NamedTuple):
    """A pruning target that is searched: a weight, its score, and the mask that follows the score."""

    module_name: str
    name: str
    space: PruningTargetSpace

    def __str__(self) -> str:
        return f"{self.module_name}.{self.name}"

    @property
    def weight(self) -> Tensor:
        """The frozen weights."""
        return self.space.target

    @property
    def score(self) -> nn.Parameter:
        """The scores, of the weights' shape."""
        return getattr(self.space._wrapper, _SCORE.format(self.name))

    @property
    def relaxed(self) -> RelaxedMask:
        """What keeps the mask in step with the scores."""
        return getattr(self.space._wrapper, _RELAXED.format(self.name))

    def seed(self, kept: Tensor, kept_score: float, pruned_score: float) -> None:
        """Set the mask (boolean ``kept``), its budget, and the scores that stand for it."""
        wrapper = self.space._wrapper
        self.space.mask = kept.to(self.weight)
        scores = initial_scores(self.space.mask, kept_score, pruned_score)
        if hasattr(wrapper, _SCORE.format(self.name)):
            with torch.no_grad():
                self.score.copy_(scores)
        else:
            wrapper.register_parameter(_SCORE.format(self.name), nn.Parameter(scores))
            wrapper.register_state_dict_pre_hook(_refresh_all)
        setattr(wrapper, _RELAXED.format(self.name), RelaxedMask(keep=int(kept.sum())))
        self.space.apply_method = "jackpot_mul"

    def refresh(self) -> None:
        """Let the mask follow the scores."""
        self.relaxed.refresh(self.score, self.space.mask)


def _jackpot_mul(weight: Tensor, target_space: PruningTargetSpace) -> Tensor:
    """NNI's apply method of a searched target: the masked weights, with gradients for its scores."""
    wrapper, name = target_space._wrapper, target_space._target_name
    score = getattr(wrapper, _SCORE.format(name), None)
    if score is None:
        return mul_mask(weight, target_space)
    return getattr(wrapper, _RELAXED.format(name)).apply(weight, score, target_space.mask)


pruning_apply_methods["jackpot_mul"] = _jackpot_mul


def _refresh_all(wrapper: ModuleWrapper, prefix: str, keep_vars: bool) -> None:
    """Before a state dict is taken: the masks in it are those of the scores in it."""
    for name, space in wrapper.pruning_target_spaces.items():
        score = getattr(wrapper, _SCORE.format(name), None)
        if score is not None:
            getattr(wrapper, _RELAXED.format(name)).refresh(score, space.mask)


def drop_masked_weights(module: nn.Module, args: Any, output: Any) -> None:
    """After a forward: share the frozen weights with the module.

    NNI leaves the masked weights there, with their graph, which can neither be copied nor pickled.
    """
    wrapper: Any = module._nni_wrapper
    for name, space in wrapper.pruning_target_spaces.items():
        if space.target is not None:
            module._buffers[name] = space.target.detach()


def keep_statistics(module: nn.Module, args: Any) -> None:
    """Before a forward of a normalisation layer: use the statistics it has, and leave them."""
    module.eval()
