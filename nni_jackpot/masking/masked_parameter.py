"""One searched parameter: frozen weights, scores, the mask that follows the scores, and masked weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_weights import Cache, StraightThrough, as_int8, identity, without_gradients
from nni_jackpot.masking.refresh import LastChange, Mode, update_masks
from nni_jackpot.masking.soft_mask import mask_softly, soft_mask
from nni_jackpot.masking.topk import Threshold

# Forwards of several threads may find one mask stale. A lock per mask could not be pickled.
_refreshing = threading.RLock()


class Space(Protocol):
    """Where the tensors of a target are stored, and what the config list says about the target.

    NNI's target spaces are the implementation in use.

    Attributes
    ----------
    target
        The frozen weights.
    setting
        The entries of the config list for this target.
    """

    target: Any
    setting: dict[str, Any]
    sparse_ratio: float | None
    sparse_threshold: Any
    min_sparse_ratio: float | None
    max_sparse_ratio: float | None
    global_group_id: Any
    granularity: Any

    @property
    def own_mask(self) -> Tensor:
        """The mask, boolean, of the target's shape."""

    @property
    def score(self) -> Any:
        """The scores; None before the search of the target begins."""

    def start(self, score: nn.Parameter, mask: Tensor, parameter: MaskedParameter, is_first: bool) -> None:
        """Store the tensors; the first target of a score group registers the scores."""


class MaskedParameter:
    """A parameter whose frozen weights are read under a mask of exactly ``keep`` grains.

    The mask contains the grains of largest score (Eq. 5). The masked weights are cached, and rewritten only
    where the mask changes. Subclasses may show training something else than the mask (`read`).

    Parameters
    ----------
    module_name, name
        Names of the module and of its parameter.
    space
        Where weights, scores and mask are stored.
    grains
        What a score stands for.
    seed
        Seed of methods that draw random numbers; members of a score group have one seed.

    Attributes
    ----------
    keep
        Number of grains that the next update keeps.
    swap_limit
        Number of grains that may enter, and leave, in one update; None for no limit.
    temperature
        Temperature of the soft mask (`soft_mask`) that forwards with gradients see; 0 for the mask.
    mode
        When the mask is updated.
    is_read
        Whether a forward that is not compiled has read the masked weights.
    last_change
        What the last update changed.
    cache
        The masked weights, once they have been read.
    """

    def __init__(self, module_name: str, name: str, space: Space, grains: Grains, seed: int = 0) -> None:
        self.module_name = module_name
        self.name = name
        self.space = space
        self.grains = grains
        self.seed = seed
        self.cache: Cache | None = None
        # The version counter of the scores is not enough: fused optimizers and writes through .data leave it
        # unchanged. So events after which scores may have changed are counted as well.
        self._ticks = 0
        self.reset(grains.count)

    def reset(self, keep: int) -> None:
        """Return to the state before a search, with a mask of ``keep`` grains."""
        self.keep = keep
        self.swap_limit: int | None = None
        self.temperature = 0.0
        self.mode = Mode.LAZY
        self.is_read = False
        self.last_change = LastChange()
        self.threshold = Threshold()
        self._mask_of: tuple[int, int] | None = None
        self._kept, self._kept_version = keep, -1

    def __str__(self) -> str:
        return f"{self.module_name}.{self.name}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies of scores and masks count their versions from zero.
        return {**self.__dict__, "cache": None, "_mask_of": None, "_kept_version": -1}

    @property
    def weight(self) -> Tensor:
        """The frozen weights."""
        return self.space.target

    @property
    def score(self) -> nn.Parameter:
        """The scores, one per grain; members of a score group have them in common."""
        return self.space.score

    @property
    def mask(self) -> Tensor:
        """The mask as it was last updated, boolean, of the weights' shape."""
        return self.space.own_mask

    @property
    def flips(self) -> int | Tensor:
        """Number of weights that entered or left the mask in its last update."""
        return self.last_change.count * self.grains.size

    # -- initial mask

    def set_initial(self, score: nn.Parameter, kept: Tensor, is_first: bool) -> None:
        """Set the mask, and the scores that belong to it.

        Parameters
        ----------
        score
            The scores.
        kept
            The grains that the mask keeps, boolean.
        is_first
            Whether the parameter is the first member of its score group.
        """
        mask = self.grains.expand(kept.view(self.grains.score_shape))
        mask = mask.to(self.weight.device).expand(self.grains.shape).clone()
        self.reset(int(kept.sum()))
        self.space.start(score, mask, self, is_first)
        self.mark_fresh()

    def prune_to(self, keep: int, importance: Tensor) -> None:
        """Keep another number of grains at once: those of largest score, then of largest importance."""
        self.keep = keep
        preferred = self.grains.select(importance, keep).view(self.grains.score_shape)
        before = self.grains.of_mask(self.mask)
        kept = self.grains.select(self.score.detach().view(self.grains.score_shape), keep, previous=preferred)
        self.replace_mask(kept, before)

    # -- updates of the mask

    @property
    def is_behind(self) -> bool:
        """Whether the scores may have changed since the mask was updated."""
        return self._mask_of != (self.score._version, self._ticks)

    def note_change(self) -> None:
        """Note that the scores may have changed, whatever their version says."""
        self._ticks += 1

    def refresh(self) -> None:
        """Update the mask, in place, if the scores may have changed.

        Raises
        ------
        SearchDivergedError
            If a score is NaN; the mask is then unchanged.
        """
        if self.is_behind:
            with _refreshing:
                update_masks([self])

    def mark_fresh(self, places: Tensor | None = None) -> None:
        """Note that the mask belongs to the scores, and which flat grains have changed for it."""
        self._mask_of = (self.score._version, self._ticks)
        self._kept, self._kept_version = self.keep, self.mask._version
        self.last_change = LastChange(None if places is None else self._compact(places), is_accepted=False)

    def _compact(self, places: Tensor) -> Tensor:
        """Return places as booleans if these take less memory."""
        if places.dtype == torch.bool or places.element_size() * len(places) <= self.grains.count:
            return places
        changed = torch.zeros(self.grains.count, dtype=torch.bool, device=places.device)
        changed[places] = True
        return changed

    @property
    def known_kept(self) -> int | None:
        """Number of grains in the mask; None if other code has written to the mask."""
        return self._kept if self.mask._version == self._kept_version else None

    def replace_mask(self, kept: Tensor, before: Tensor) -> None:
        """Set the mask to the grains ``kept``, where the grains ``before`` were kept; both boolean."""
        places = (kept != before).reshape(-1).nonzero()[:, 0]
        if len(places):
            self.mask.copy_(self.grains.expand(kept))
        self.mark_fresh(places)
        self.update_cache()

    # -- masked weights

    def read(self, weight: Tensor, is_training: bool, may_write: bool = False) -> Tensor:
        """Return what stands for the weights in a forward.

        Parameters
        ----------
        weight
            The weights without a mask, which a quantizer or a parametrization may have computed.
        is_training
            Whether the module is in train mode.
        may_write
            Whether backward may overwrite the gradient of the result, because no other code reads it.
        """
        return self.masked(weight, may_write)

    def masked(self, weight: Tensor, may_write: bool = False) -> Tensor:
        """Return the masked weights (Eq. 4-6), of the weights' shape; the mask is updated if necessary."""
        score, mask = self.score, self.mask
        gives_gradient = torch.is_grad_enabled() and score.requires_grad
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            self.is_read = True
        if self.mode is not Mode.LAZY and self._can_use_cache(weight, gives_gradient):
            values = self.cache.values  # type: ignore[union-attr]
        elif is_compiling:
            values, mask = self._current_uncompiled(weight, gives_gradient)
        else:
            values, mask = self._current(weight, gives_gradient)
        shaped: Tensor = score if self.grains.scaler is None else score.view(self.grains.score_shape)
        cache = None
        if not is_compiling and self.cache is not None and values is self.cache.values:
            cache = self.cache
        # A compiler copies tensors as it likes.
        may_write = may_write and not is_compiling
        return StraightThrough.apply(weight, shaped, values, mask, self.grains, may_write, cache)

    def _can_use_cache(self, weight: Tensor, gives_gradient: bool) -> bool:
        """Return True if the cache is fresh in a search, which updates the cache after every step."""
        cache = self.cache
        # In training the temperature is not read: a compiler would compile again whenever it changes.
        if cache is None or (not gives_gradient and self.temperature > 0):
            return False
        if torch.compiler.is_compiling():  # the compiler knows neither identities nor versions of tensors
            is_own = isinstance(weight, nn.Parameter)
        else:
            is_own = weight is cache.weight and cache.checked == self._versions(weight)
        return is_own and (weight.device, weight.dtype) == (cache.values.device, cache.values.dtype)

    def _versions(self, weight: Tensor) -> tuple[Any, ...]:
        return weight._version, self.score._version, self._ticks, self.temperature

    def cache_key(self, weight: Tensor) -> tuple[Any, ...]:
        """Return all that the masked weights of a search depend on."""
        key: tuple[Any, ...] = (*identity(weight), self.temperature)
        if self.temperature:
            key += (self.score._version, self._ticks)
        # In one long row the soft mask is a function of the scores alone.
        return key if self.temperature and self.grains.rows == 1 else key + identity(self.mask)

    @property
    def is_cache_fresh(self) -> bool:
        """Whether the cache exists and belongs to the mask and the weights."""
        return self.cache is not None and self.cache.key == self.cache_key(self.cache.weight)

    @without_gradients
    def _current(self, weight: Tensor, gives_gradient: bool) -> tuple[Tensor, Tensor]:
        """Return the masked weights, and the mask or soft mask in them."""
        is_soft = gives_gradient and self.temperature > 0
        with _refreshing:
            if not (is_soft and self.mode is Mode.DEFERRED):
                self.refresh()
                if gives_gradient and self.mode is Mode.LAZY:  # an optimizer may follow
                    self.note_change()
            if isinstance(weight, nn.Parameter) and is_soft == (self.temperature > 0):
                return self.build_cache(weight), self.mask
        # Weights that are computed are new in every forward; and forwards without gradients see the mask.
        if not is_soft:
            return weight * as_int8(self.mask), self.mask
        soft = self._soft().to(weight.dtype)
        return weight * soft, soft

    _current_uncompiled = torch.compiler.disable(_current)

    @without_gradients
    def build_cache(self, weight: Tensor) -> Tensor:
        """Return the masked weights of the search, computed again if the cache is stale."""
        cache, key = self.cache, self.cache_key(weight)
        if cache is None or cache.key != key:
            values = None if cache is None or cache.graphs else cache.values
            if values is None or (values.device, values.dtype) != (weight.device, weight.dtype):
                values = torch.empty_like(weight)
            if self.temperature:
                if self.grains.scaler is None and self.score.dtype == weight.dtype:
                    score = self.score.detach().view(weight.shape)
                    mask_softly(weight, score, self.mask, self.keep, self.grains, self.temperature, values)
                else:
                    torch.mul(weight, self._soft().to(weight.dtype), out=values)
            else:
                torch.mul(weight, as_int8(self.mask), out=values)
            cache = self.cache = Cache(values, weight, key)
        cache.checked = self._versions(weight)
        return cache.values

    def update_cache(self) -> None:
        """Compute the cached weights again if there are any and they are stale."""
        if self.cache is not None:
            self.build_cache(self.cache.weight)

    def renew_cache(self) -> None:
        """Note that the cached values have been written in place for the scores and the mask."""
        assert self.cache is not None
        weight = self.cache.weight
        self.cache = Cache(self.cache.values, weight, self.cache_key(weight))
        self.cache.checked = self._versions(weight)

    def writable_cache(self) -> Tensor:
        """Return the cached values for writing in place: a copy if an autograd graph still needs them."""
        assert self.cache is not None
        if self.cache.graphs:
            self.cache = self.cache.copy()
        return self.cache.values

    def _soft(self) -> Tensor:
        """Return the soft mask, of the weights' shape or broadcastable to it."""
        scores = self.score.detach().view(self.grains.score_shape)
        soft = soft_mask(scores, self.mask, self.keep, self.grains, self.temperature)
        return self.grains.expand(soft)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return mask and state as plain data; the scores are saved with the model."""
        return {
            "mask": self.mask,
            "keep": self.keep,
            "kept": self._kept,
            "is_behind": self.is_behind,
            "swap_limit": self.swap_limit,
            "temperature": self.temperature,
            "flipped": self.last_change.places,
            "accepted": self.last_change.is_accepted,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, TypeError or LookupError for a state that this parameter cannot have had."""
        mask, count = state["mask"], self.grains.count
        if not isinstance(mask, Tensor) or (mask.shape, mask.dtype) != (self.mask.shape, self.mask.dtype):
            raise ValueError(f"the mask of {self} has another shape or type")
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"the mask of {self} has other settings")
        for key in ("keep", "kept"):
            if type(state[key]) is not int or not 0 < state[key] <= count:
                raise ValueError(f"{self} keeps {state[key]!r} of {count}")
        if int(self.grains.of_mask(mask).sum()) != state["kept"]:
            raise ValueError(f"the mask of {self} does not keep {state['kept']}")
        places = state["flipped"]
        if places is None or not places.numel():
            return
        is_boolean = places.dtype == torch.bool
        if not (len(places) == count if is_boolean else 0 <= places.min() <= places.max() < count):
            raise ValueError(f"the changes of {self} are of another size")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore mask and state; the scores have been restored before."""
        self.mask.copy_(state["mask"])
        self.keep, self.swap_limit = state["keep"], state["swap_limit"]
        self.temperature = state["temperature"]
        places = state["flipped"]
        self.mark_fresh(None if places is None else places.to(self.score.device))
        self.last_change.is_accepted = state["accepted"]
        self._kept = state["kept"]
        if state["is_behind"]:
            self.note_change()
