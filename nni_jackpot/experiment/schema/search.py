"""The section ``search`` of a run's YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nni_jackpot.experiment.schema.rules import Invalid, inlined
from nni_jackpot.experiment.schema.training import EPOCHS
from nni_jackpot.masking.budgets import BUDGETS
from nni_jackpot.masking.criteria import CRITERIA
from nni_jackpot.masking.methods.method import LR, METHODS, Method
from nni_jackpot.runtime.registry import close_match
from nni_jackpot.runtime.settings import Rule, between, one_of, option, shown
from nni_jackpot.search.blockwise import BlockSearch
from nni_jackpot.search.blockwise.polish import Polish
from nni_jackpot.search.match_dense import MATCHING_LOSSES
from nni_jackpot.search.options import NORMS

_MINUTES = Rule("> 0 and <= 1e6", lambda value: 0 < value <= 1e6)


def _settings_of_recipe(section: Mapping[str, Any]) -> Method | None:
    """Return a method's settings by the recipe that the section ``search`` names."""
    method, recipe = section.get("method", "edge_popup"), section.get("recipe", "default")
    if method not in METHODS:  # of a finished run whose plugin is not imported
        return None
    recipes = METHODS.find(method).recipes()
    if recipe not in recipes:
        wanted = f"a string out of {', '.join(recipes)}{close_match(recipe, recipes)}"
        raise Invalid("recipe", f"found {shown(recipe)}, allowed: {wanted}")
    return recipes[recipe]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for the jackpot; the settings of the chosen method stand in this section, too."""

    epochs: int = option("passes over the training data", EPOCHS)
    init: str = option("criterion of the initial masks", one_of(CRITERIA), "magnitude")
    method: str = option("how masks follow scores", one_of(METHODS), "edge_popup")
    recipe: str = option(
        "named set of values of the method's settings; values given beside it override it", default="default"
    )
    settings: Any = inlined(_settings_of_recipe)  # noqa: RUF009
    init_batches: int = option(
        "batches that init and budget take gradients or activations from", between(1, 10**6), 1
    )
    loss: str = option(
        "loss that trains the scores: that of the labels, or the distance to the dense network's outputs",
        one_of(("labels", *MATCHING_LOSSES)),
        "labels",
    )
    blockwise: BlockSearch | None = option(  # noqa: RUF009
        "settings of a search block by block, which needs no labels; null to search the network as a whole",
        default=None,
    )
    polish: Polish | None = option(  # noqa: RUF009
        "settings of a training of all masks after the blocks, by search.loss; null for none", default=None
    )
    budget: str = option(
        "how zeros are shared out among targets without a global_group_id", one_of(BUDGETS), "as_configured"
    )
    norm: str = option(
        "whether normalisation statistics adapt to the masks (adapt) or are frozen (freeze), or adapt while "
        "affines of norm layers and biases are trained along (tune)",
        one_of(NORMS),
        "adapt",
    )
    reestimate_norm: bool | None = option(
        "whether normalisation statistics are re-estimated after the search; null for all but the paper's "
        "edge_popup",
        default=None,
    )
    checkpoint_every: int = option(
        "steps between checkpoints, from which an interrupted search resumes",
        between(1, 10**9),
        500,
        affects="nothing",
    )
    checkpoint_minutes: float = option(
        "minutes between checkpoints, if steps take longer", _MINUTES, 5.0, affects="nothing"
    )

    @property
    def named_init(self) -> str:
        """Name of the initial masks, with which masks found block by block are compared."""
        return self.init if self.blockwise is None else "wanda"

    def __post_init__(self) -> None:
        if self.settings is None:
            object.__setattr__(self, "settings", _settings_of_recipe(vars(self)))
        if self.reestimate_norm is None:
            default = (self.method, self.recipe) != ("edge_popup", "paper")
            object.__setattr__(self, "reestimate_norm", default)
        if self.blockwise is not None and self.epochs:
            raise Invalid("epochs", f"found {self.epochs}, allowed: 0 beside blockwise, which has steps")
        if self.blockwise is not None and self.norm == "tune":
            raise Invalid("norm", "found tune, allowed beside blockwise: adapt, freeze")
        if self.polish is not None and self.blockwise is None:
            raise Invalid("polish", "found a mapping, allowed: null without blockwise")
        if self.polish is not None and self.loss == "labels":
            raise Invalid("loss", f"found labels, allowed beside polish: {', '.join(MATCHING_LOSSES)}")
        if isinstance(own := self.settings, Method):
            lr = LR if own.lr is None else own.lr
            if lr * own.weight_decay > 2 * (1 + own.momentum):
                most = f"up to {2 * (1 + own.momentum) / lr:.3g} with lr {lr}"
                raise Invalid(
                    "weight_decay",
                    f"found {own.weight_decay}, allowed: {most}, beyond which scores only grow",
                )
