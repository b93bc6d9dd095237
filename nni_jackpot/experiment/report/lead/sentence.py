"""The sentence that a report leads with: what was found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nni_jackpot.experiment.report.lead.contests import contests
from nni_jackpot.experiment.report.measures import SPARSITY, Measure, labels


def sentence(measures: Sequence[Measure]) -> str:
    """Return what was found, in one sentence, about the contest of most methods; empty without a contest.

    The best method is compared with the best jackpot; a jackpot that is the best method, with the next one.
    Among contests of as many methods, the one of most zeros counts.
    """
    found = contests(measures)
    if not found:
        return ""
    main = max(reversed(found), key=lambda one: len(one.methods))
    names = dict(zip(map(id, main.methods), labels(main.methods, SPARSITY), strict=True))
    best = main.methods[0]
    jackpot = next((one for one in main.methods if one.kind == "jackpot"), None)
    clauses = [
        f"At {main.title}, {_named(names[id(best)])} is the best of {len(main.methods)} methods with"
        f" {_value(best)} after {cost(best)}"
    ]
    other = main.methods[1] if best is jackpot else jackpot
    if other is not None:
        verb = "is next with" if best is jackpot else "has"
        clauses.append(
            f"{_named(names[id(other)])} {verb} {_value(other)} after {cost(other)}, {_distance(best, other)}"
        )
    dense = [one for one in measures if one.kind == "dense" and one.is_part_of(best)]
    clauses += [f"the dense network has {_value(one)}" for one in dense]
    return "; ".join(clauses) + "."


def cost(one: Measure) -> str:
    """Return what a method took, in words."""
    total, seconds = one.mean("total_epochs"), one.mean("seconds")
    if one.epochs == 0 and seconds is not None:
        return f"{seconds:.3g} s"
    epochs, which = (one.epochs, "after pre-training") if total is None else (total, "in all")
    return f"{epochs:g} epoch{'' if epochs == 1 else 's'} {which}"


def _named(name: str) -> str:
    return f"the {name}" if name.startswith("jackpot") else name


def _value(one: Measure) -> str:
    return one.measured.spread(one.values.values()) + (" %" if one.measured.is_percent else "")


def _distance(best: Measure, other: Measure) -> str:
    """Return the difference of two means, and whether it is within the larger standard deviation."""
    values = [list(one.values.values()) for one in (best, other)]
    means = [statistics.mean(own) for own in values]
    difference = abs(means[0] - means[1])
    less = "more" if best.measured.lower_is_better else "less"
    said = f"{best.measured.spread([difference])} {less}"
    if min(map(len, values)) < 2:
        return f"{said} in a comparison of single runs"
    is_within = difference <= max(map(statistics.stdev, values))
    return f"{said}, {'within' if is_within else 'more than'} one standard deviation"
