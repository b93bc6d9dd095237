"""The relaxed mask of edge-popup: scores, and the mask that follows them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from nni_jackpot.masking.granularity import Grains
from nni_jackpot.masking.masked_weights import Masked, StraightThrough, as_numbers, without_gradients
from nni_jackpot.masking.methods.method import DECAY, MaskSchedule, Method, register_method
from nni_jackpot.masking.methods.soft_mask import soft_mask
from nni_jackpot.masking.topk import Threshold, swap_at_most, update_top, update_tops
from nni_jackpot.runtime.settings import Rule, SettingError, between, option

# Forwards of several threads may find the same mask out of date. A lock for each mask could not be pickled.
_refreshing = threading.RLock()


def initial_scores(kept: Tensor, kept_score: float, pruned_score: float, dtype: torch.dtype) -> Tensor:
    """Relax a mask to scores: kept grains get one value, the others a slightly lower one (Sec. 4.1).

    Half-precision weights have float32 scores: a step of the search is far smaller than what bfloat16 can add
    to a number near 1.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    scores = torch.full(kept.shape, pruned_score, dtype=dtype, device=kept.device)
    return scores.masked_fill_(kept, kept_score)


class RelaxedMask:
    """Keeps one target's mask in step with its scores, with exactly ``keep`` grains at every moment.

    Scores and mask stay where PyTorch looks for parameters and buffers; this object holds only what decides
    when the mask is out of date, and the masked weights, which change where the mask does and nowhere else.
    The mask is refreshed lazily, by whoever is about to use it, so that every loop, optimizer and
    accumulation scheme is right without being patched.

    Parameters
    ----------
    grains
        What one score stands for.
    keep
        How many grains the target keeps.

    Attributes
    ----------
    method
        Name of the way to search, one of `nni_jackpot.masking.methods.supermask.METHODS`.
    keep
        How many grains it keeps from the next refresh on.
    swap_limit
        How many grains may enter, and as many leave, in one refresh; None for any number.
    temperature
        Of the soft mask (`soft_mask`) that a forward sees in place of the mask, if it gives the scores a
        gradient; 0 for the mask.
    is_told
        Whether somebody refreshes after every change of the scores, so that none has to be suspected.
    is_read
        Whether somebody has read the masked weights, in a forward that is not compiled.
    masked
        The masked weights of the search, once there are any.
    """

    method = "edge_popup"

    def __init__(self, grains: Grains, keep: int) -> None:
        self.grains = grains
        self.keep = keep
        self.swap_limit: int | None = None
        self.temperature = 0.0
        self.is_told = False
        self.is_read = False
        # By the mask as it was of this version; somebody may have loaded another.
        self._kept, self._mask_version = keep, -1
        self._threshold = Threshold()
        self._flipped: Tensor | None = None  # places of flat grains, or true where one has flipped
        self._accepted = True
        self._seen_version = -1
        self._may_have_moved = False
        self.masked: Masked | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Made again when needed. Copies of scores and masks count their versions anew.
        return {**self.__dict__, "masked": None, "_seen_version": -1, "_mask_version": -1}

    @property
    def flips(self) -> int | Tensor:
        """How many weights changed sides in the last refresh; a tensor where that is on an accelerator."""
        if self._flipped is None:
            return 0
        places = self._flipped.count_nonzero() if self._flipped.dtype == torch.bool else len(self._flipped)
        return places * self.grains.size

    def refresh(self, score: Tensor, mask: Tensor) -> None:
        """Let the mask follow the scores, in place, if these may have changed.

        Raises
        ------
        SearchDivergedError
            If a score is NaN; the mask is then left as it was.
        """
        # The version counter alone is not enough: fused optimizers and writes through .data leave it where
        # it was. An optimizer acts on gradients, so a forward that could give some counts as a change.
        if score._version != self._seen_version or self._may_have_moved:
            with _refreshing:
                self.refresh_now(score, mask)

    @without_gradients
    def refresh_now(self, score: Tensor, mask: Tensor) -> None:
        """Let the mask follow the scores, in place, whatever is known of them; raises as `refresh`."""
        if self.goes_with_others(score):
            refresh_sets([(self, score, mask)])
        elif self.grains.scaler is not None or self.grains.rows > 1 or self.swap_limit is not None:
            self._refresh_grains(score, mask)
        else:
            self._update(score, mask)

    def goes_with_others(self, score: Tensor) -> bool:
        """Return whether the mask is refreshed along with others, for the host to wait once for all."""
        return is_accelerator(score.device) and self.swap_limit is None

    def settle(self, score: Tensor, flipped: Tensor | None = None) -> None:
        """Note that the mask is the scores', and which flat grains have flipped for it."""
        self._flipped = None if flipped is None else _compact(flipped, self.grains.count)
        self._accepted = False
        self._kept = self.keep
        if self.temperature and not self.can_wait and self.masked is not None:
            self.masked.is_stale = True
        self._seen_version = score._version
        self._may_have_moved = False

    @property
    def can_wait(self) -> bool:
        """Whether training sees no mask for now, so that it is enough if it follows when it is asked for."""
        return self.is_told and self.temperature > 0 and self.grains.rows == 1

    def wait(self, score: Tensor, mask: Tensor) -> None:
        """Leave the mask as it is, to be refreshed when it is asked for; only the soft one follows now."""
        self._may_have_moved = True
        if self.masked is not None:
            self.masked.is_stale = True
        self.remake(score, mask)

    def has_values(self, mask: Tensor) -> bool:
        """Return whether the masked weights are there, and those of the mask."""
        return self.masked is not None and self.masked.is_same(self.masked.weight, mask)

    def lend_values(self) -> Tensor:
        """Return the masked weights for others to write: a copy where a graph still needs them."""
        assert self.masked is not None
        if self.masked.graphs:
            self.masked = self.masked.copy()
        return self.masked.values

    def take_values(self, score: Tensor, mask: Tensor | None) -> None:
        """Note that others have written the masked weights: under the mask, or the soft one for None."""
        assert self.masked is not None
        increment_version(self.masked.values)
        self.masked = Masked(self.masked.values, self.masked.weight, score, mask)
        if mask is None:
            self._may_have_moved = True

    def changes(self, mask: Tensor) -> Tensor:
        """Return a flat boolean tensor for the places that change in a refresh, in place of those before."""
        before = self._flipped
        is_fit = before is not None and before.dtype == torch.bool and before.device == mask.device
        return before if is_fit else torch.empty_like(mask).view(-1)  # type: ignore[return-value]

    def _refresh_grains(self, score: Tensor, mask: Tensor, favoured: Tensor | None = None) -> None:
        """Refresh a mask of channels, blocks or rows, or one whose swaps are limited."""
        before = self.grains.of_mask(mask)
        scores = score.detach().view(self.grains.score_shape)
        kept = self.grains.select(scores, self.keep, previous=before if favoured is None else favoured)
        if self.swap_limit is not None and favoured is None:
            kept = swap_at_most(kept, before, scores, self.swap_limit)
        flipped = (kept != before).reshape(-1).nonzero()[:, 0]
        if len(flipped):
            mask.copy_(self.grains.expand(kept))
        self.settle(score, flipped)
        self.remake(score, mask)

    def soften(self, temperature: float) -> None:
        """Let forwards that give a gradient see a soft mask of this temperature, or at 0 the mask."""
        if temperature != self.temperature and self.masked is not None:
            self.masked.is_stale = True
        self.temperature = temperature

    def resize(self, keep: int, score: Tensor, mask: Tensor, favoured: Tensor) -> None:
        """Keep another number of grains from now on: those of largest score, ``favoured`` first among equals.

        Parameters
        ----------
        favoured
            Boolean, of the scores' shape: as many grains as are to be kept, the most important ones.
        """
        self.keep = keep
        self._refresh_grains(score, mask, favoured)

    def apply(self, weight: Tensor, score: Tensor, mask: Tensor, may_write: bool = False) -> Tensor:
        """Return the masked weights (Eq. 4-6), of the target's shape, the mask refreshed first.

        Parameters
        ----------
        may_write
            Whether backward may overwrite the gradient of the masked weights, since nobody else will read it.
        """
        gives_gradient = torch.is_grad_enabled() and score.requires_grad
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            self.is_read = True
        # In a search all has been done by whoever moved the scores, and there is nothing to break a graph.
        masked = self.masked if self.is_told and (gives_gradient or not self.temperature) else None
        if masked is not None and masked.is_ready_for(weight, score):
            values = masked.values
        elif is_compiling:
            values, mask = self._up_to_date_uncompiled(weight, score, mask, gives_gradient)
        else:
            values, mask = self._up_to_date(weight, score, mask, gives_gradient)
        if self.grains.scaler is not None:
            score = score.view(self.grains.score_shape)
        # A compiler makes copies as it sees fit.
        may_write = may_write and not is_compiling
        cache = self.masked if values is self._values and not is_compiling else None
        return StraightThrough.apply(weight, score, values, mask, self.grains, may_write, cache)

    @property
    def _values(self) -> Tensor | None:
        return None if self.masked is None else self.masked.values

    @without_gradients
    def _up_to_date(
        self, weight: Tensor, score: Tensor, mask: Tensor, gives_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the masked weights, and what they are masked by."""
        is_soft = gives_gradient and self.temperature > 0
        with _refreshing:
            if not (is_soft and self.can_wait):
                self.refresh(score, mask)
                self._may_have_moved = gives_gradient and not self.is_told
            if isinstance(weight, nn.Parameter) and is_soft == (self.temperature > 0):
                return self.make(weight, score, mask), mask
        # The output of a quantizer or a parametrization, new every time, or a look at the mask in the midst
        # of a soft search.
        if not is_soft:
            return weight * as_numbers(mask), mask
        soft = self._soft(score, mask).to(weight.dtype)
        return weight * soft, soft

    _up_to_date_uncompiled = torch.compiler.disable(_up_to_date)

    @without_gradients
    def make(self, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weights of the search, made anew if they are of another weight or mask."""
        made_of = None if self.can_wait else mask
        if self.masked is not None and self.masked.is_same(weight, made_of):
            self.masked.follow(score)
        else:
            values = None if self.masked is None else self.masked.free_values()
            if values is None or (values.device, values.dtype) != (weight.device, weight.dtype):
                values = torch.empty_like(weight)
            if self.temperature:
                is_fit = self.grains.scaler is None and score.dtype == weight.dtype
                soft = self._soft(score, mask, out=values if is_fit else None)
                torch.mul(weight, soft.to(weight.dtype), out=values)
            else:
                torch.mul(weight, as_numbers(mask), out=values)
            self.masked = Masked(values, weight, score, made_of)
        return self.masked.values

    def _soft(self, score: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the soft mask, of the target's shape or broadcastable to it; in rows, of a fresh mask."""
        scores = score.detach().view(self.grains.score_shape)
        soft = soft_mask(scores, mask, self.keep, self.grains, self.temperature, out=out)
        return self.grains.expand(soft)

    def remake(self, score: Tensor, mask: Tensor) -> None:
        """Make the masked weights of the search anew, if there are any and they are out of date."""
        if self.masked is not None:
            self.make(self.masked.weight, score, mask)

    def _update(self, score: Tensor, mask: Tensor) -> None:
        """Refresh a mask of single weights, and the masked weights at the few places that change."""
        masked, is_fresh = self.masked, self.has_values(mask)
        n_kept = self._kept if mask._version == self._mask_version else None
        places = update_top(score, self.keep, mask, n_kept=n_kept, threshold=self._threshold)
        self._mask_version = mask._version
        has_changed = is_fresh and not self.temperature and len(places) > 0
        if masked is not None and has_changed and masked.weight.is_contiguous():
            values = self.lend_values()
            values.view(-1)[places] = masked.weight.view(-1)[places] * mask.view(-1)[places]
            self.masked = Masked(values, masked.weight, score, mask)
        self.settle(score, places)
        self.remake(score, mask)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain data."""
        return {
            "keep": self.keep,
            "kept": self._kept,
            "is_behind": self._may_have_moved,
            "swap_limit": self.swap_limit,
            "temperature": self.temperature,
            "flipped": self._flipped,
            "accepted": self._accepted,
        }

    def restore(self, state: dict[str, Any], score: Tensor) -> None:
        """Take over a state along with the scores and the mask that were of it."""
        self.keep, self.swap_limit = state["keep"], state["swap_limit"]
        self.temperature = state["temperature"]
        flipped = state["flipped"]
        self.settle(score, None if flipped is None else flipped.to(score.device))
        self._accepted = state["accepted"]
        self._kept, self._may_have_moved = state["kept"], state["is_behind"]
        if self.masked is not None:
            self.masked.is_stale = True

    def accept(self) -> None:
        """Note that the mask has proven good, so that `undo` goes back no further."""
        self._accepted = True

    def undo(self, mask: Tensor) -> None:
        """Take back the flips since the mask was last accepted, in place."""
        if not self._accepted and self._flipped is not None:
            kept = self.grains.of_mask(mask)
            kept.view(-1)[self._flipped] ^= True
            mask.copy_(self.grains.expand(kept))
            self._accepted = True


def _compact(places: Tensor, count: int) -> Tensor:
    """Return flat places out of so many, as a boolean tensor where that takes less memory."""
    if places.dtype == torch.bool or places.element_size() * len(places) <= count:
        return places
    flipped = torch.zeros(count, dtype=torch.bool, device=places.device)
    flipped[places] = True
    return flipped


Target = tuple[RelaxedMask, Tensor, Tensor]  # relaxed mask, score, mask


@torch.no_grad()
def refresh_sets(targets: Sequence[Target]) -> None:
    """Refresh masks on an accelerator, of whatever grains, and wait for it once.

    Raises
    ------
    SearchDivergedError
        If a score is NaN; all masks are then left as they were.
    """
    sets = []
    for relaxed, score, mask in targets:
        grains = relaxed.grains
        scores = grains.by_row(score.detach().view(grains.score_shape))
        kept = grains.by_row(grains.of_mask(mask))  # the mask itself, or some of it, or a copy
        sets.append((scores, relaxed.keep // grains.rows, kept if grains.are_rows else kept.clone()))
    for (relaxed, score, mask), (*_, kept), changed in zip(targets, sets, update_tops(sets), strict=True):
        if not relaxed.grains.are_rows:
            mask.copy_(relaxed.grains.expand(relaxed.grains.of_rows(kept)))
        relaxed.settle(score, relaxed.grains.of_rows(changed).reshape(-1))
        relaxed.remake(score, mask)


def is_accelerator(device: torch.device) -> bool:
    """Return whether the host had better not wait for a device."""
    return device.type != "cpu"


_SHARE = Rule("> 0 and <= 1", lambda value: 0 < value <= 1)
_PROGRESS = Rule(">= 0 and <= 1", lambda value: 0 <= value <= 1)
_SCORE = Rule(">= -1e6 and <= 1e6", lambda value: -1e6 <= value <= 1e6)


@register_method("edge_popup")
@dataclass(frozen=True, kw_only=True)
class EdgePopup(Method):
    """Settings of edge-popup: the mask keeps the grains of largest score (Eq. 4-6)."""

    weight_decay: float = option("weight decay of the scores", DECAY, 0.05)
    ramp_end: float = option("progress at which the masks have all their zeros", _PROGRESS, 0.5)
    temperature: float = option(
        "temperature of the soft masks at the start, 0 for hard masks", between(0, 10**6), 0.5
    )
    anneal_end: float = option("progress at which the temperature is 0", _PROGRESS, 0.9)
    reallocate: bool = option(
        "whether targets of one budget group trade weights during the search", default=True
    )
    kept_score: float = option("initial score of kept weights", _SCORE, 1.0)
    pruned_score: float = option("initial score of pruned weights", _SCORE, 0.95)
    swap_limit: float | None = option(
        "largest share of kept weights replaced in one step, annealed; null for no limit", _SHARE, None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pruned_score < self.kept_score:
            raise SettingError(
                "pruned_score",
                f"found {self.pruned_score}, allowed: a number < kept_score, which is {self.kept_score}",
            )
        if self.temperature and not self.anneal_end:
            raise SettingError("temperature", f"found {self.temperature}, allowed with anneal_end > 0")
        if self.swap_limit is not None and (self.ramp_end or self.temperature or self.reallocate):
            allowed = "allowed with ramp_end 0, temperature 0 and reallocate false, as in recipe paper"
            raise SettingError("swap_limit", f"found {self.swap_limit}, {allowed}")

    @classmethod
    def paper(cls, **changes: Any) -> EdgePopup:
        """Return the settings of the paper (Sec. 4.1)."""
        own = {"lr": 0.1, "weight_decay": 5e-4, "normalize": False, "reallocate": False}
        return cls(**{**own, "ramp_end": 0.0, "temperature": 0.0, "anneal_end": 0.0, **changes})

    @classmethod
    def recipes(cls) -> dict[str, Method]:
        """Return the named sets of settings."""
        return {"default": cls(), "paper": cls.paper()}

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial scores of kept and of pruned grains."""
        return self.kept_score, self.pruned_score

    @property
    def schedule(self) -> MaskSchedule:
        """How the masks change over the search."""
        return MaskSchedule(
            self.ramp_end, self.temperature, self.anneal_end, self.reallocate, self.swap_limit
        )
