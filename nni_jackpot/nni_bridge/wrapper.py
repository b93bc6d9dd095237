"""NNI's module wrappers, which hold parameters, scores and masks, and give modules masked weights.

All functions of a wrapper are defined at module level or in its class, and read their data from the wrapper.
So a wrapped model can be copied, pickled and moved to another device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nni.compression.base.apply_method import mul_mask, pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.modules.attributes import Source, compute, is_computed, plain_class, stop_computing
from nni_jackpot.modules.parameters import Holders, steady_parametrizations

SCORE = "{}_score"
MASKED = "{}_masked"
ALIGNED = "{}_aligned_mask"
APPLY_METHOD = "jackpot_mul"
# Modules whose forward uses the weight once, in an operation whose weight gradient no other code reads.
_PLAIN_MODULES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

# The wrapper of the plain module that runs its forward in this thread, and so reads the weight.
_running = threading.local()


class LeanSpace(PruningTargetSpace):
    """A target space that returns its settings without a copy: NNI copies all settings on every read."""

    @property
    def setting(self) -> dict[str, Any]:
        """The settings, which a forward reads several times."""
        return self._setting

    @property
    def target(self) -> Tensor | None:
        """The weights without a mask; None for an input or output, or for a parameter that is None."""
        return self._wrapper.dense(self._target_name) if self.type is TargetType.PARAMETER else None

    @property
    def own_mask(self) -> Tensor:
        """The mask itself, boolean once the target is searched."""
        return raw_mask(self)

    @property
    def score(self) -> nn.Parameter | None:
        """The scores; None if the target is not searched."""
        return self._wrapper.score(self._target_name)

    def start(self, score: nn.Parameter, mask: Tensor, parameter: MaskedParameter, is_first: bool) -> None:
        """Store the tensors of a searched target; only the first of a score group registers the scores.

        Formats such as safetensors refuse a tensor under two names.
        """
        if self.score is None:
            if is_first:
                self._wrapper.register_parameter(SCORE.format(self._target_name), score)
            else:
                self._wrapper.shared_scores[self._target_name] = score
        if not isinstance(self, SearchedSpace):
            self.mask = None
            self.__class__ = SearchedSpace
        self.mask = mask
        setattr(self._wrapper, MASKED.format(self._target_name), parameter)
        if self.apply_method != "bypass":  # type: ignore[has-type]  # a property of NNI
            self.apply_method = APPLY_METHOD


class SearchedSpace(LeanSpace):
    """A target space whose mask takes one byte per weight instead of four; NNI reads a copy as numbers."""

    @property
    def mask(self) -> Tensor | None:
        """The mask as numbers of the target's type, 0 and 1."""
        mask, weight = raw_mask(self), self.target
        return None if mask is None or weight is None else mask.to(weight.dtype)

    @mask.setter
    def mask(self, value: Tensor | None) -> None:
        mask = raw_mask(self)
        if mask is None or value is None:
            self._set_wrapper_attr(self._mask_name, None if value is None else value.bool())
        else:
            mask.copy_(value)


class TiedSpace(LeanSpace):
    """The target space of a tied parameter, whose score and mask belong to another module's wrapper."""

    primary: PruningTargetSpace

    @property
    def target(self) -> Tensor | None:
        """The weights without a mask."""
        return self.primary.target

    @property
    def mask(self) -> Tensor | None:
        """The mask of the primary space."""
        return self.primary.mask

    @mask.setter
    def mask(self, value: Tensor | None) -> None:
        self.primary.mask = value


def raw_mask(space: PruningTargetSpace) -> Tensor:
    """Return the mask that the wrapper stores, not a copy."""
    return space._wrapper._buffers[space._mask_name]


class SearchedWrapper(ModuleWrapper):
    """A wrapper that gives masked weights to all code that reads the weights.

    NNI's wrapper assigns masked weights to its module before each forward of the module. Code that reads the
    weight at another time gets an old value. NNI's wrapper also copies each parameter; this wrapper holds the
    parameter itself, and returns it when the module is unwrapped.
    """

    # By target name, the modules that hold the parameter and its name there; several if it is tied.
    holders: dict[str, list[tuple[nn.Module, str]]]
    # Scores that are parameters of another wrapper, by target name; a state dict has each score once.
    shared_scores: dict[str, nn.Parameter]
    pruning_target_spaces: dict[str, Any]
    quantization_target_spaces: dict[str, Any]
    # Values that NNI's forward has assigned to attributes of the module; None outside of a forward.
    _given: dict[str, Tensor | None] | None
    _is_plain: bool
    _had_forward: bool

    @classmethod
    def adopt(cls, wrapper: ModuleWrapper, holders: Holders) -> None:
        """Turn NNI's wrapper into one of this class, which holds the parameters themselves.

        Parameters
        ----------
        wrapper
            Wrapper of a module that is not wrapped at the moment.
        holders
            Modules that hold each parameter of the model.
        """
        if type(wrapper) is ModuleWrapper:
            wrapper.__class__ = cls
            wrapper.shared_scores, wrapper._given = {}, None
            wrapper.register_track_func(_refresh_before_use)
            wrapper.register_state_dict_pre_hook(refresh_masks)
        if not isinstance(wrapper, cls):
            return
        module = wrapper.module
        wrapper.holders = {}
        wrapper._is_plain = type(module) in _PLAIN_MODULES and "forward" not in vars(module)
        for space in wrapper.pruning_target_spaces.values():
            if type(space) is PruningTargetSpace:
                space.__class__ = LeanSpace
        for name in wrapper._parameter_names():
            own = module._parameters.get(name)
            if own is not None:
                wrapper._parameters[name] = own
                wrapper.holders[name] = holders[id(own)]
            elif parametrize.is_parametrized(module, name):
                wrapper._buffers.pop(name, None)
                wrapper.holders[name] = [(module, name)]

    def _parameter_names(self) -> list[str]:
        """Return the names of the parameters that the module reads from this wrapper."""
        spaces = {**self.quantization_target_spaces, **self.pruning_target_spaces}
        return [
            name
            for name, space in spaces.items()
            if space.type is TargetType.PARAMETER and not isinstance(space, TiedSpace)
        ]

    # -- wrapping

    def wrap(self) -> None:
        """Move the parameters from their modules to this wrapper, where the modules read them."""
        self._had_forward = "forward" in vars(self.module)
        with self._without_spaces():
            super().wrap()
        for name, holders in self.holders.items():
            for holder, attribute in holders:
                compute(holder, attribute, Source(self, name))

    def unwrap(self) -> None:
        """Return the same parameter objects to their modules."""
        for name, holders in self.holders.items():
            for holder, attribute in holders:
                if is_computed(holder, attribute):
                    stop_computing(holder, attribute, self._parameters.get(name))
        with self._without_spaces():
            super().unwrap()
        if not self._had_forward:  # NNI adds this attribute and does not remove it
            del self.module.forward

    @contextmanager
    def _without_spaces(self) -> Iterator[None]:
        """Hide the target spaces from NNI, which would copy the parameters."""
        spaces = self.pruning_target_spaces, self.quantization_target_spaces
        self.pruning_target_spaces, self.quantization_target_spaces = {}, {}
        try:
            yield
        finally:
            self.pruning_target_spaces, self.quantization_target_spaces = spaces

    # -- attributes

    def dense(self, name: str) -> Tensor | None:
        """Return a parameter without a mask: itself, or the output of its parametrizations."""
        if name in self._parameters:
            return self._parameters[name]
        if parametrize.is_parametrized(self.module, name):
            with steady_parametrizations(self.module):
                return self._computed(name)
        return self._buffers[name]

    @torch.no_grad()
    def _computed(self, name: str) -> Tensor:
        """Return the output of the parametrizations of a parameter."""
        return getattr(plain_class(self.module), name).fget(self.module)

    def parameter(self, name: str) -> nn.Parameter | None:
        """Return the parameter itself; None for one that parametrizations compute."""
        return self._parameters.get(name)

    def score(self, name: str) -> nn.Parameter | None:
        """Return the scores of a parameter; None if it is not searched."""
        return self._parameters.get(SCORE.format(name), self.shared_scores.get(name))

    def read(self, name: str) -> Tensor | None:
        """Return a parameter as training and evaluation see it: masked, quantized or unchanged."""
        if self._given is not None and name in self._given:
            return self._given[name]
        space, score = self.pruning_target_spaces.get(name), self.score(name)
        is_computed = name not in self._parameters and parametrize.is_parametrized(self.module, name)
        value = self._computed(name) if is_computed else self.dense(name)
        if name not in self.quantization_target_spaces and space is not None:
            if score is not None and value is not None and space.apply_method == APPLY_METHOD:
                return self._masked(name, value)
            if raw_mask(space) is None and not hasattr(self, ALIGNED.format(name)):
                return value
        return self.patch_helper(name, value)

    def give(self, name: str, value: Tensor | None) -> None:
        """Store a value that NNI assigns to an attribute in a forward.

        Raises
        ------
        AttributeError
            If the assignment happens outside of a forward.
        """
        if self._given is None:
            raise AttributeError(f"{self.name}.{name} is masked: call unwrap_model() before assigning to it")
        self._given[name] = value

    def _masked(self, name: str, weight: Tensor) -> Tensor:
        """Return what a forward reads in place of the weights of a searched target."""
        may_write = not torch.compiler.is_compiling() and getattr(_running, "wrapper", None) is self
        return self.__dict__[MASKED.format(name)].read(weight, self.module.training, may_write)

    # -- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, whose attributes are masked; by NNI's forward if other compressors need it."""
        if self._has_others():
            self._given = {}
            try:
                return super().forward(*args, **kwargs)
            finally:
                self._given = None
        if torch.compiler.is_compiling() or not self._is_plain:
            return self.module_forward(*args, **kwargs)
        before, _running.wrapper = getattr(_running, "wrapper", None), self
        try:
            return self.module_forward(*args, **kwargs)
        finally:
            _running.wrapper = before

    def _has_others(self) -> bool:
        if self.quantization_target_spaces or self.distillation_target_spaces or self.fused_modules:
            return True
        of_values = any(s.type is not TargetType.PARAMETER for s in self.pruning_target_spaces.values())
        return of_values or getattr(self, "is_bias_correction", False)

    def patch_params(self, targets_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the attributes that NNI itself assigns to the module; `read` returns all others."""
        if not self.fused_modules and not getattr(self, "is_bias_correction", False):
            quantized = self.quantization_target_spaces
            targets_dict = {name: target for name, target in targets_dict.items() if name in quantized}
        tied = {name for name, s in self.pruning_target_spaces.items() if isinstance(s, TiedSpace)}
        return super().patch_params({name: t for name, t in targets_dict.items() if name not in tied})

    def _apply_mask_helper(self, target: Any, target_space: PruningTargetSpace) -> Any:
        if isinstance(target_space, SearchedSpace):
            return pruning_apply_methods[target_space.apply_method](target, target_space)
        is_whole = target_space.type is TargetType.PARAMETER and target_space.mask is None
        if is_whole and target is not None and not target.requires_grad:
            return target.detach()
        return super()._apply_mask_helper(target, target_space)

    # -- moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the wrapper; scores keep the precision that a search needs."""
        scores = {
            name: (score, score.data)
            for name in self.pruning_target_spaces
            if (score := self._parameters.get(SCORE.format(name))) is not None
        }
        super()._apply(fn, recurse)
        for name, (score, before) in scores.items():
            weight = self.dense(name)
            assert weight is not None
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if score.dtype != dtype:
                grad = score.grad
                score.grad = None
                score.data = torch.empty_like(score.data, dtype=dtype).copy_(before)
                score.grad = None if grad is None else grad.to(dtype)
        return self


def _jackpot_mul(weight: Tensor, target_space: PruningTargetSpace) -> Tensor:
    """Return masked weights with gradients for the scores: NNI's apply method of searched targets."""
    wrapper, name = target_space._wrapper, target_space._target_name
    score = wrapper.score(name)
    return mul_mask(weight, target_space) if score is None else wrapper._masked(name, weight)


pruning_apply_methods[APPLY_METHOD] = _jackpot_mul


def _refresh_before_use(wrapper: SearchedWrapper, target_name: str, target: Any) -> None:
    """Update an aligned mask; NNI's tracking of targets calls this right before a mask is applied."""
    if hasattr(wrapper, ALIGNED.format(target_name)):
        refresh_mask(wrapper.pruning_target_spaces[target_name])


def refresh_mask(space: PruningTargetSpace) -> None:
    """Update a mask to the scores or to the mask that it follows."""
    wrapper, name = space._wrapper, space._target_name
    if isinstance(space, TiedSpace):
        refresh_mask(space.primary)
    elif (aligned := getattr(wrapper, ALIGNED.format(name), None)) is not None:
        aligned.refresh(space)
    elif isinstance(wrapper, SearchedWrapper) and wrapper.score(name) is not None:
        getattr(wrapper, MASKED.format(name)).refresh()


def refresh_masks(wrapper: ModuleWrapper, *state_dict_arguments: Any) -> None:
    """Update all masks of a wrapper; also a hook that runs before a state dict is taken."""
    for space in wrapper.pruning_target_spaces.values():
        refresh_mask(space)
