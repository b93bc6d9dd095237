"""Settings that have no effect because of others: the one list of them, and their refusal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nni_jackpot.experiment.schema.rules import Invalid, related
from nni_jackpot.experiment.schema.training import TrainConfig
from nni_jackpot.masking.budgets import BUDGETS, criterion_of_budget
from nni_jackpot.masking.criteria import CRITERIA, needs_of
from nni_jackpot.runtime.settings import shown

if TYPE_CHECKING:
    from nni_jackpot.experiment.config import RunConfig

_TRAINING = [entry.name for entry in fields(TrainConfig)]


class _Idle(NamedTuple):
    """Settings without effect: dotted names, the setting that makes them so, and the words for that."""

    names: list[str]
    switch: str
    why: str


def _idle(config: RunConfig) -> Iterator[_Idle]:
    """Iterate over the settings of a run that have no effect on its results.

    Settings that never have one (`option` with ``affects="nothing"``) are left out.
    """
    search = config.search
    lengths = [name for name in _TRAINING if name != "epochs"]
    method = ["method", "recipe", "reestimate_norm"]
    if is_dataclass(search.settings):
        method += [entry.name for entry in fields(search.settings)]
    if config.pretrain.checkpoint is not None:
        yield _Idle(_in("pretrain", _TRAINING), "pretrain.checkpoint", "pretrain.checkpoint has the weights")
        if not any(own.from_scratch for own in config.comparators.values()):
            yield _Idle(["model.init"], "pretrain.checkpoint", "pretrain.checkpoint has the weights")
    elif not config.pretrain.epochs:
        yield _Idle(_in("pretrain", lengths), "pretrain.epochs", "pretrain.epochs is 0")
    if not config.finetune.epochs:
        yield _Idle(_in("finetune", [*lengths, "under"]), "finetune.epochs", "finetune.epochs is 0")
    if search.blockwise is not None:
        why = "search.blockwise searches in another way"
        yield _Idle(_in("search", [*method, "norm"]), "search.blockwise", why)
    elif not search.epochs:
        yield _Idle(_in("search", method), "search.epochs", "search.epochs is 0")
    criteria = [CRITERIA[search.init], criterion_of_budget(BUDGETS[search.budget])]
    if all(criterion is None or needs_of(criterion) == "weights" for criterion in criteria):
        yield _Idle(["search.init_batches"], "search.init", "search.init and search.budget need no batches")
    for name, own in config.comparators.items():
        if getattr(own, "has_own_masks", None) is False:
            section = f"comparators.{name}"
            yield _Idle([f"{section}.budget"], f"{section}.start", f"{section}.start is {own.start}")


def check_effects(
    config: RunConfig, raw: Any, overrides: Collection[str], read: Callable[[Any], RunConfig]
) -> None:
    """Refuse given settings that have no effect.

    A value that the run would have anyway is allowed: the file that a run writes has all values. So is a
    value that an override makes idle, such as ``finetune.epochs=0``: a search space combines values, and in
    some of its combinations others have no effect.

    Parameters
    ----------
    config
        The run.
    raw
        The content of its file, with the overrides.
    overrides
        Dotted names of the values that do not come from the file.
    read
        Reads such content.

    Raises
    ------
    Invalid
        For the first of them.
    """
    given = [
        (name, idle)
        for idle in _idle(config)
        for name in idle.names
        if _has(raw, name.split(".")) and not _any_of(idle.switch, overrides)
    ]
    if not given:
        return
    bare = raw
    for name, _ in given:
        bare = _without(bare, name.split("."))
    usual = read(bare)
    for name, idle in given:
        found = _value(config, name)
        if found != _value(usual, name):
            raise Invalid(
                name, f"found {shown(found)}, which has no effect because {idle.why}: remove the key"
            )


def _in(section: str, names: list[str]) -> list[str]:
    return [f"{section}.{name}" for name in names]


def _any_of(name: str, overrides: Collection[str]) -> bool:
    return any(related(name, one) for one in overrides)


def _has(node: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _without(node: Any, parts: list[str]) -> Any:
    first, *rest = parts
    if rest:
        return {**node, first: _without(node[first], rest)}
    return {key: value for key, value in node.items() if key != first}


def _value(config: Any, name: str) -> Any:
    """Return a setting by its dotted name; those of the method stand in a dataclass of their own."""
    for part in name.split("."):
        inner = getattr(config, "settings", None)
        config = (
            config[part] if isinstance(config, Mapping) else getattr(config, part, getattr(inner, part, None))
        )
    return config
