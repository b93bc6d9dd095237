"""Edge-popup: training sees the mask of the largest scores, or a soft mask that hardens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nni_jackpot.masking.methods.method import DECAY, LR, MaskSchedule, Method, register_method
from nni_jackpot.runtime.settings import Rule, SettingError, between, option

_PROGRESS = between(0, 1)
_SCORE = between(-1e6, 1e6)
_SHARE = Rule("> 0 and <= 1", lambda value: 0 < value <= 1)


@register_method("edge_popup")
@dataclass(frozen=True, kw_only=True)
class EdgePopup(Method):
    """Settings of edge-popup (Eq. 4-6).

    The defaults need fewer epochs than the paper's settings (docs/recipes.md), which are `paper`. Two of
    them depend on the network (`suited_to`). With batch norm, zeros ramp up and masks are soft at first.
    Without batch norm nothing rescales the signals that soft masks shrink: masks have all their zeros from
    the start, and the search divides ``lr`` by ten if its first steps do harm.

    Attributes
    ----------
    lr, momentum, weight_decay, normalize
        As for `Method`.
    ramp_end, temperature, anneal_end, reallocate, swap_limit
        As for `MaskSchedule`.
    kept_score, pruned_score
        Initial scores of kept and of pruned grains (Sec. 4.1).

    Raises
    ------
    SettingError
        If a setting is out of range, or does not go with the others.
    """

    weight_decay: float = option("weight decay of the scores", DECAY, 0.05)
    ramp_end: float | None = option(
        "progress at which masks have all their zeros; null for 0.5 with batch norm, else 0", _PROGRESS, None
    )
    temperature: float | None = option(
        "temperature of the soft masks at the start, in standard deviations of the scores; 0 for none; null "
        "for 0.5 with batch norm, else 0",
        between(0, 1e6),
        None,
    )
    anneal_end: float = option("progress at which masks are soft no more", _PROGRESS, 0.9)
    reallocate: bool = option(
        "whether targets of one global_group_id trade weights during the search", default=True
    )
    kept_score: float = option("initial score of kept grains", _SCORE, 1.0)
    pruned_score: float = option("initial score of pruned grains", _SCORE, 0.95)
    swap_limit: float | None = option(
        "largest share of a target's kept grains that one step may replace, annealed with the learning rate; "
        "null for no limit",
        _SHARE,
        None,
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
        changes = (self.ramp_end, self.temperature, self.reallocate)
        if self.swap_limit is not None and changes != (0, 0, False):
            raise SettingError(
                "swap_limit",
                f"found {self.swap_limit}, allowed with ramp_end 0, temperature 0 and reallocate false, "
                "which recipe paper has",
            )

    @classmethod
    def paper(cls, **settings: Any) -> EdgePopup:
        """Return the settings of Sec. 4.1, with ``settings`` in place of some."""
        paper = cls(
            lr=0.1,
            weight_decay=5e-4,
            normalize=False,
            ramp_end=0.0,
            temperature=0.0,
            anneal_end=0.0,
            reallocate=False,
        )
        return replace(paper, **settings)

    @classmethod
    def recipes(cls) -> dict[str, Method]:
        """Return the default settings and the paper's."""
        return {"default": cls(), "paper": cls.paper()}

    def suited_to(self, has_batch_norm: bool) -> EdgePopup:
        """Return the settings with values that suit a network in place of None."""
        value = 0.5 if has_batch_norm else 0.0
        return replace(
            self,
            lr=LR if self.lr is None else self.lr,
            ramp_end=value if self.ramp_end is None else self.ramp_end,
            temperature=value if self.temperature is None else self.temperature,
        )

    @property
    def initial_scores(self) -> tuple[float, float]:
        """Initial scores of kept and of pruned grains."""
        return self.kept_score, self.pruned_score

    @property
    def schedule(self) -> MaskSchedule:
        """How the masks change over the search, of settings that `suited_to` has completed."""
        ramp_end, temperature = self.ramp_end or 0.0, self.temperature or 0.0
        return MaskSchedule(ramp_end, temperature, self.anneal_end, self.reallocate, self.swap_limit)
