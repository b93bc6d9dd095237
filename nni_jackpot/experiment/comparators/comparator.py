"""Rows of a comparison whose weights train: settings of a training, and how masks change meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar

from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.runtime.registry import Registry
from nni_jackpot.runtime.settings import Rule, one_of, option
from nni_jackpot.training import DENSE, TRAINING_METHODS, TrainingMethod
from nni_jackpot.training.initial import BUDGET, CRITERION

_GIVEN = ("initial", "jackpot", DENSE)


@dataclass(frozen=True, kw_only=True)
class Comparator(TrainConfig, TrainingMethod):
    """A training method with the settings of its training, and where it starts.

    Attributes
    ----------
    name
        Name under which the comparator is registered, and the kind of its row.
    """

    name: ClassVar[str]

    start: str = option(
        "masks at the start: the initial masks of the search, the jackpot's, none (dense), or masks of their "
        "own by a criterion",
        Rule(
            lambda: f"out of {', '.join(_GIVEN)}, {CRITERION.allowed.removeprefix('out of ')}",
            lambda value: value in _GIVEN or CRITERION.holds(value),
            is_open=True,
        ),
        "initial",
    )
    budget: str = option(
        "how masks of their own share out the zeros among targets", BUDGET, "erdos_renyi_kernel"
    )
    from_scratch: bool = option(
        "whether weights start from random values in place of the pre-trained ones", default=False
    )

    @property
    def is_dense_at_start(self) -> bool:
        """Whether the training starts without zeros."""
        return self.start == DENSE

    @property
    def has_own_masks(self) -> bool:
        """Whether the training starts from masks of its own."""
        return self.start not in _GIVEN

    @property
    def prunes_single_weights(self) -> bool:
        """Whether masks are made, or changed, without regard to channels, blocks and N:M patterns."""
        is_fixed = type(self).update is TrainingMethod.update
        return self.is_dense_at_start or self.has_own_masks or not is_fixed

    @property
    def all_epochs(self) -> int:
        """Epochs of all trainings of the method."""
        return self.epochs * self.trainings


class _Comparators(Registry[type[Comparator]]):
    """Comparators by name: those registered, and every training method, with its paper's start."""

    def find(self, name: str) -> type[Comparator]:
        if name not in self._objects and name in TRAINING_METHODS:
            self._objects[name] = _comparator_of(TRAINING_METHODS[name])
        return super().find(name)

    def __getitem__(self, name: str) -> type[Comparator]:
        return self.find(name) if name in TRAINING_METHODS else super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter({**TRAINING_METHODS, **self._objects})

    def __len__(self) -> int:
        return len(list(iter(self)))


def _comparator_of(method: type[TrainingMethod]) -> type[Any]:
    """Return the comparator of a training method, which starts as its paper does."""
    paper, own = method.paper, {entry.name: entry for entry in fields(Comparator)}
    only_dense = one_of((DENSE,)) if paper.masks == DENSE else own["start"].metadata["rule"]
    values = {
        "start": (str, only_dense, paper.masks),
        "budget": (str, own["budget"].metadata["rule"], paper.budget),
        "from_scratch": (bool, own["from_scratch"].metadata["rule"], paper.from_scratch),
    }
    return make_dataclass(
        method.__name__,
        [
            (name, kind, option(own[name].metadata["doc"], rule, default))
            for name, (kind, rule, default) in values.items()
        ],
        bases=(method, Comparator),
        namespace={"__doc__": method.__doc__, "__module__": __name__, "name": method.name},
        frozen=True,
        kw_only=True,
    )


COMPARATORS: Registry[type[Comparator]] = _Comparators("comparator")
register_comparator = COMPARATORS.register_class
