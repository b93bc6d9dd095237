from __future__ import annotations

import random
from functools import partial
from math import inf, prod

import pytest
import torch
from torch import Tensor

from nni_jackpot.errors import SearchDivergedError
from nni_jackpot.masking.budgets import (
    BUDGETS,
    Unit,
    as_configured,
    by_erdos_renyi_kernel,
    by_global_rank,
    by_lamp,
    by_outliers,
    criterion_of_budget,
    kept_count,
    register_budget,
)
from nni_jackpot.masking.criteria import magnitude, wanda

RATIOS = [0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.999]


def single_weights(importance: dict[str, Tensor], sparse_ratio: float) -> dict[str, Unit]:
    return {key: Unit(scores.numel(), 1, sparse_ratio) for key, scores in importance.items()}


def group_zeros(units: dict[str, Unit]) -> int:
    """Zeros of a group in weights, spelled out."""
    first = next(iter(units.values()))
    if all(
        (u.sparse_ratio, u.weights_per_grain) == (first.sparse_ratio, first.weights_per_grain)
        for u in units.values()
    ):
        return int(first.sparse_ratio * sum(u.grains for u in units.values())) * first.weights_per_grain
    return sum(int(u.sparse_ratio * u.grains) * u.weights_per_grain for u in units.values())


def zero_bounds(unit: Unit) -> tuple[int, int]:
    per_row = unit.grains // unit.rows
    return int(unit.min_sparse_ratio * per_row) * unit.rows, int(unit.max_sparse_ratio * per_row) * unit.rows


def ranked_reference(units: dict[str, Unit], importance: dict[str, Tensor]) -> dict[str, int]:
    """The rule spelled out: one list of all grains, pruned from its end until the zeros are used up."""
    left = group_zeros(units)
    zeros, contested = {}, []
    for order, (key, unit) in enumerate(units.items()):
        flat = importance[key].flatten().tolist()
        rising = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[::-1]
        low, high = zero_bounds(unit)
        zeros[key] = low
        left -= low * unit.weights_per_grain
        contested += [(-flat[i], order, i, key) for i in rising[low:high]]
    for *_, key in sorted(contested)[::-1]:
        left -= units[key].weights_per_grain
        if left < 0:
            break
        zeros[key] += 1
    return {key: unit.grains - zeros[key] // unit.rows * unit.rows for key, unit in units.items()}


def random_units(rng: random.Random, *, one_kind: bool, bounded: bool) -> dict[str, Unit]:
    units = {}
    ratio, size = rng.choice(RATIOS), rng.choice([1, 9])
    for i in range(rng.randint(1, 6)):
        rows = rng.choice([1, 1, 2, 4])
        kernel = rng.choice([(), (), (3, 3), (1, 5)])
        shape = (rng.randint(1, 6) * rows, rng.randint(1, 12), *kernel)
        grains = shape[0] if not one_kind and rng.random() < 0.5 else prod(shape)
        low, high = sorted([rng.choice(RATIOS), rng.choice([*RATIOS, 1.0])]) if bounded else (0.0, 1.0)
        units[f"u{i}"] = Unit(
            grains=grains,
            weights_per_grain=size if one_kind else prod(shape) // grains,
            sparse_ratio=ratio if one_kind else rng.choice(RATIOS),
            min_sparse_ratio=low,
            max_sparse_ratio=high,
            shape=shape,
            rows=rows,
        )
    return units


IMPORTANCE = {
    "distinct": lambda n, g: torch.rand(n, generator=g),
    "three values": lambda n, g: torch.randint(3, (n,), generator=g).float(),
    "all equal": lambda n, g: torch.ones(n),
    "denormal": lambda n, g: torch.rand(n, generator=g) * 1e-42,
    "outliers": lambda n, g: torch.tensor([1e38, inf, -inf, 0.0, -0.0]).repeat(n)[:n],
    "double": lambda n, g: 1 + torch.rand(n, generator=g).double() * 1e-12,
}


@pytest.mark.honours("budget: global_rank")
@pytest.mark.parametrize("make", IMPORTANCE.values(), ids=IMPORTANCE)
@pytest.mark.parametrize("one_kind", [True, False], ids=["one kind", "many kinds"])
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "free"])
def test_global_rank_is_that_of_one_sorted_list(make, one_kind: bool, bounded: bool) -> None:
    for seed in range(40):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        units = random_units(rng, one_kind=one_kind, bounded=bounded)
        importance = {key: make(unit.grains, generator).reshape(unit.rows, -1) for key, unit in units.items()}
        budgets = by_global_rank(units, importance)
        assert budgets == ranked_reference(units, importance)
        zeros = {key: unit.grains - budgets[key] for key, unit in units.items()}
        forced = sum(zero_bounds(unit)[0] * unit.weights_per_grain for unit in units.values())
        pruned = sum(zeros[key] * unit.weights_per_grain for key, unit in units.items())
        assert pruned <= max(forced, group_zeros(units))


@pytest.mark.parametrize("rule", [BUDGETS.find(name) for name in BUDGETS], ids=list(BUDGETS))
def test_every_rule_keeps_to_rows_and_bounds(rule) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        units = random_units(rng, one_kind=rng.random() < 0.5, bounded=True)
        importance = {key: torch.ones(unit.grains) for key, unit in units.items()}
        budgets = rule(units, importance)
        assert list(budgets) == list(units)
        for key, unit in units.items():
            zeros = unit.grains - budgets[key]
            low, high = zero_bounds(unit)
            assert zeros % unit.rows == 0
            assert low <= zeros <= high
            assert type(budgets[key]) is int


@pytest.mark.parametrize("rule", [BUDGETS.find(name) for name in BUDGETS], ids=list(BUDGETS))
def test_a_unit_without_weights_keeps_nothing(rule) -> None:
    units = {"none": Unit(0, 0, 0.5, shape=(0, 3)), "some": Unit(12, 1, 0.5, shape=(4, 3))}
    importance = {"none": torch.ones(0, 3), "some": torch.ones(4, 3)}
    assert rule(units, importance) == {"none": 0, "some": 6}
    assert rule({"none": units["none"]}, importance) == {"none": 0}


@pytest.mark.parametrize(
    ("numel", "ratio"), [(10, 0.7), (100, 0.29), (9, 0.9), (7, 0.0), (1, 0.5), (1000, 0.999)]
)
def test_zeros_are_int_of_ratio_times_numel(numel: int, ratio: float) -> None:
    assert numel - kept_count(numel, ratio) == int(ratio * numel)
    assert as_configured({"a": Unit(numel, 1, ratio)}, {}) == {"a": numel - int(ratio * numel)}
    assert by_global_rank({"a": Unit(numel, 3, ratio)}, {"a": torch.ones(numel)}) == {
        "a": numel - int(ratio * numel)
    }


@pytest.mark.honours("budget: as_configured")
def test_as_configured() -> None:
    units = {
        "plain": Unit(10, 1, 0.5),
        "odd": Unit(7, 9, 0.5),
        "rows": Unit(14, 1, 0.5, rows=2),
        "raised": Unit(10, 1, 0.1, min_sparse_ratio=0.25),
        "lowered": Unit(10, 1, 0.9, max_sparse_ratio=0.65),
    }
    assert as_configured(units, {}) == {"plain": 5, "odd": 4, "rows": 8, "raised": 8, "lowered": 4}


def test_global_rank_counts_the_members_of_one_ranking() -> None:
    importance = {"a": torch.tensor([1.0, 5.0, 6.0]), "b": torch.tensor([[2.0, 3.0], [4.0, 0.5]])}
    # zeros: int(0.5 * 7) = 3 of 0.5, 1, 2
    assert by_global_rank(single_weights(importance, 0.5), importance) == {"a": 2, "b": 2}
    assert by_global_rank(single_weights(importance, 0.8), importance) == {"a": 2, "b": 0}


@pytest.mark.parametrize("ratio", RATIOS)
def test_global_rank_is_exact_under_ties(ratio: float) -> None:
    importance = {"a": torch.ones(10), "b": torch.ones(11)}
    budgets = by_global_rank(single_weights(importance, ratio), importance)
    assert sum(budgets.values()) == 21 - int(ratio * 21)
    assert budgets["b"] == max(0, 11 - int(ratio * 21))  # the later unit goes first


def test_global_rank_leaves_the_rest_to_others_at_a_bound() -> None:
    importance = {"weak": torch.arange(10.0), "strong": torch.arange(100.0, 110.0)}
    units = {"weak": Unit(10, 1, 0.5, max_sparse_ratio=0.6), "strong": Unit(10, 1, 0.5, min_sparse_ratio=0.1)}
    assert by_global_rank(units, importance) == {"weak": 4, "strong": 6}


def test_global_rank_stops_at_the_grain_that_does_not_fit() -> None:
    importance = {"small": torch.tensor([1.0, 3.0, 4.0, 5.0]), "large": torch.tensor([2.0, 9.0])}
    units = {"small": Unit(4, 1, 0.75), "large": Unit(2, 4, 0.0)}  # 3 weights: 1, but not the next with its 4
    assert by_global_rank(units, importance) == {"small": 3, "large": 2}


def test_global_rank_does_not_round_what_is_double() -> None:
    importance = {"a": torch.tensor([1 + 1e-12], dtype=torch.float64), "b": torch.tensor([1.0])}
    reversed_order = {key: importance[key] for key in "ba"}
    for given in (importance, reversed_order):
        assert by_global_rank(single_weights(given, 0.5), given) == {"a": 1, "b": 0}


def test_global_rank_takes_half_precision_beside_others() -> None:
    importance = {"a": torch.tensor([1.0, 2.0]).bfloat16(), "b": torch.tensor([1.5, 3.0]).half()}
    assert by_global_rank(single_weights(importance, 0.5), importance) == {"a": 1, "b": 1}


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9)])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_global_rank_of_nan_is_an_error(sizes: tuple[int, int], ratio: float) -> None:
    importance = {"a": torch.ones(4), "b": torch.tensor([1.0, float("nan")])}
    units = {key: Unit(importance[key].numel(), size, ratio) for key, size in zip("ab", sizes, strict=True)}
    with pytest.raises(SearchDivergedError, match="NaN"):
        by_global_rank(units, importance)


def conv(out_channels: int, in_channels: int, kernel: int, ratio: float, **bounds: float) -> Unit:
    shape = (out_channels, in_channels, kernel, kernel)
    return Unit(prod(shape), 1, ratio, shape=shape, **bounds)


def erk_reference(units: dict[str, Unit]) -> dict[str, float]:
    """Kept weights of every unit, not rounded: the common factor of the densities found by halving."""
    configured = as_configured(units, {})
    target = sum(configured[key] * unit.weights_per_grain for key, unit in units.items())

    def kept(factor: float) -> dict[str, float]:
        result = {}
        for key, unit in units.items():
            low, high = zero_bounds(unit)
            density = factor * sum(unit.shape) / prod(unit.shape)
            size = unit.weights_per_grain
            result[key] = min(max(density * unit.grains, unit.grains - high), unit.grains - low) * size
        return result

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) < target else (low, middle)
    return kept(high)


@pytest.mark.honours("budget: erdos_renyi_kernel")
@pytest.mark.parametrize("one_kind", [True, False], ids=["one kind", "many kinds"])
@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "free"])
def test_erdos_renyi_kernel_keeps_the_total_and_the_proportions(one_kind: bool, bounded: bool) -> None:
    for seed in range(200):
        units = random_units(random.Random(seed), one_kind=one_kind, bounded=bounded)
        budgets = by_erdos_renyi_kernel(units, {})
        configured = as_configured(units, {})
        missing = sum(
            (configured[key] - budgets[key]) * unit.weights_per_grain for key, unit in units.items()
        )
        assert 0 <= missing < max(unit.weights_per_grain * unit.rows for unit in units.values())
        if len({(unit.weights_per_grain, unit.rows) for unit in units.values()}) == 1:
            assert missing == 0
        for key, exact in erk_reference(units).items():
            unit = units[key]
            assert (
                abs(budgets[key] * unit.weights_per_grain - exact) < unit.weights_per_grain * unit.rows + 1e-6
            )


def test_erdos_renyi_kernel_by_hand() -> None:
    units = {
        "square": Unit(400, 1, 0.8, shape=(20, 20)),
        "flat": Unit(600, 1, 0.8, shape=(10, 60)),
    }
    # 200 kept weights, shared as 20 + 20 to 10 + 60, are 72.7 and 127.3.
    for order in (("square", "flat"), ("flat", "square")):
        assert by_erdos_renyi_kernel({key: units[key] for key in order}, {}) == {"square": 73, "flat": 127}


def test_erdos_renyi_kernel_shares_out_what_a_dense_unit_cannot_take() -> None:
    units = {"first": conv(4, 1, 3, 0.5), "second": conv(16, 4, 3, 0.5), "third": conv(16, 16, 3, 0.5)}
    budgets = by_erdos_renyi_kernel(units, {})
    total = sum(as_configured(units, {}).values())
    assert budgets["first"] == 36
    assert budgets["second"] == 576
    assert budgets["third"] == total - 36 - 576


def test_erdos_renyi_kernel_of_one_unit_is_its_own_ratio() -> None:
    for ratio in RATIOS:
        assert by_erdos_renyi_kernel({"a": conv(8, 3, 3, ratio)}, {}) == {"a": kept_count(216, ratio)}


def test_erdos_renyi_kernel_decides_equal_remainders_by_order() -> None:
    units = {key: Unit(9, 1, ratio, shape=(3, 3)) for key, ratio in (("a", 0.0), ("b", 0.9), ("c", 0.9))}
    assert by_erdos_renyi_kernel(units, {}) == {"a": 4, "b": 4, "c": 3}


def test_erdos_renyi_kernel_takes_a_scalar() -> None:
    units = {"scalar": Unit(1, 1, 0.5), "matrix": Unit(16, 1, 0.5, shape=(4, 4))}
    assert by_erdos_renyi_kernel(units, {}) == {"scalar": 1, "matrix": 8}


def test_the_largest_remainder_gets_the_weight_that_is_left() -> None:
    """Shares go by the sum of the sides, 30 and 70: of 144 kept weights 43.2 and 100.8."""
    units = {
        "small": Unit(grains=200, weights_per_grain=1, sparse_ratio=0.9, shape=(20, 10)),
        "large": Unit(grains=1200, weights_per_grain=1, sparse_ratio=0.897, shape=(30, 40)),
    }
    assert by_erdos_renyi_kernel(units, {}) == {"small": 43, "large": 101}


# -- OWL and LAMP


def total(units: dict[str, Unit], budgets: dict[str, int]) -> int:
    return sum(budgets[key] * unit.weights_per_grain for key, unit in units.items())


def with_outliers(shares: dict[str, float], n: int = 1000) -> dict[str, Tensor]:
    """Return importances, the given share of which are 100 times the others, in random order."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, share in shares.items():
        values = torch.ones(n)
        values[torch.randperm(n, generator=generator)[: int(share * n)]] = 100.0
        found[key] = values
    return found


@pytest.mark.honours("budget: owl")
def test_owl_against_its_formula() -> None:
    """Densities of units of one size: 2 lambda (D - min) / (max - min), moved to the mean 1 - S."""
    shares = {"a": 0.01, "b": 0.02, "c": 0.05, "d": 0.0}
    importance = with_outliers(shares)
    for threshold, span, ratio in ((5.0, 0.08, 0.7), (2.0, 0.2, 0.5)):
        units = single_weights(importance, ratio)
        d = torch.tensor([(x > threshold * x.mean()).double().mean() for x in importance.values()])
        density = 2 * span * (d - d.min()) / (d.max() - d.min())
        density += 1 - ratio - density.mean()
        budgets = by_outliers(units, importance, threshold, span)
        assert sum(budgets.values()) == sum(as_configured(units, {}).values())
        for keep, expected in zip(budgets.values(), density.tolist(), strict=True):
            assert abs(keep - 1000 * expected) < 1
    assert by_outliers(units, importance) == partial(by_outliers, threshold=5.0, span=0.08)(units, importance)


def test_owl_keeps_the_total_of_units_of_any_size() -> None:
    for seed in range(100):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        units = random_units(rng, one_kind=rng.random() < 0.5, bounded=rng.random() < 0.5)
        importance = {k: torch.rand(unit.grains, generator=generator) ** 20 for k, unit in units.items()}
        budgets = by_outliers(units, importance)
        missing = total(units, as_configured(units, {})) - total(units, budgets)
        assert 0 <= missing < max(unit.weights_per_grain * unit.rows for unit in units.values())
        if len({(unit.weights_per_grain, unit.rows) for unit in units.values()}) == 1:
            assert missing == 0


def test_owl_without_differences_is_as_configured() -> None:
    importance = with_outliers({"a": 0.01, "b": 0.01})
    units = {"a": Unit(1000, 1, 0.5), "b": Unit(1000, 1, 0.9)}
    assert by_outliers(units, importance) == {"a": 500, "b": 100}


@pytest.mark.honours("budget: lamp")
@pytest.mark.parametrize("ratio", RATIOS)
def test_lamp_against_its_formula(ratio: float) -> None:
    """One ranking of w_u^2 over the sum of w_v^2 of all weights of the layer that are not smaller."""
    generator = torch.Generator().manual_seed(0)
    importance = {
        key: torch.rand(n, generator=generator).double() * scale
        for key, n, scale in (("a", 40, 1.0), ("b", 100, 1e-3), ("c", 7, 1e4))
    }
    scores = []
    for key, values in importance.items():
        for w in values.tolist():
            rest = sum(v * v for v in values.tolist() if v >= w)
            scores.append((w * w / rest, key))
    keep = 147 - int(ratio * 147)
    kept = [key for _, key in sorted(scores, reverse=True)[:keep]]
    expected = {key: kept.count(key) for key in importance}
    units = single_weights(importance, ratio)
    if keep >= 3:
        assert by_lamp(units, importance) == expected
        assert min(expected.values()) >= 1
    assert sum(by_lamp(units, importance).values()) == keep


def test_lamp_does_not_see_the_scale_of_a_layer_and_takes_zeros() -> None:
    importance = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([3.0, 1.0, 0.5])}
    scaled = {"a": importance["a"] * 1e30, "b": importance["b"] * 1e-30}
    units = single_weights(importance, 0.5)
    assert by_lamp(units, importance) == by_lamp(units, scaled)
    assert sum(by_lamp(units, {key: torch.zeros(3) for key in "ab"}).values()) == 3


@pytest.mark.parametrize("rule", [by_outliers, by_lamp])
def test_budgets_of_nan_are_an_error(rule) -> None:
    importance = {"a": torch.ones(4), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(SearchDivergedError, match="NaN"):
        rule(single_weights(importance, 0.5), importance)


def test_the_criterion_that_a_budget_needs() -> None:
    assert criterion_of_budget(by_outliers) is wanda
    assert criterion_of_budget(partial(by_outliers, span=0.2)) is wanda
    assert criterion_of_budget(by_lamp) is magnitude
    assert criterion_of_budget(by_global_rank) is None
    assert criterion_of_budget(lambda units, importance: {}) is None
    with pytest.raises(ValueError, match=r"criterion must be one of magnitude, .*did you mean wanda"):
        register_budget("mine", needs="wandas")
