"""A step in one pass over memory: what the separate operations compute, up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator, same, training_step
from torch import nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.masking.cpu.kernels import library
from nni_jackpot.masks import apply_masks
from nni_jackpot.search.optimizers import fused_step
from nni_jackpot.search.optimizers.fused_step import FusedStep

CONV = {"op_types": ["Conv2d"], "sparse_ratio": 0.8}
SEARCHES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "soft masks, one budget": ([{**CONV, "global_group_id": 0}], {}),
    "hard masks": ([CONV], {"method": EdgePopup(ramp_end=0.0, temperature=0.0)}),
    "N:M": ([{"op_names": ["conv2"], "sparse_pattern": "2:4"}], {}),
    "channels": ([{**CONV, "sparse_ratio": 0.5, "granularity": "out_channel"}], {"norm": "freeze"}),
}
STEPS = 20


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fuse steps of networks of any size; return the numbers of parameters that the kernels wrote."""
    if library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(fused_step, "WORTH", 0)
    numbers: list[int] = []
    take = FusedStep.take

    def counted(step: FusedStep) -> Any:
        written = take(step)
        numbers.append(-1 if written is None else len(written))
        return written

    monkeypatch.setattr(FusedStep, "take", counted)
    return numbers


def scores_of(pruner: LotteryJackpotPruner) -> list[torch.Tensor]:
    return [score.detach().clone() for score in pruner.score_parameters()]


def searched(model: nn.Module, batches: Batches, name: str, steps: int) -> tuple[Any, Any]:
    config_list, options = SEARCHES[name]
    pruner = LotteryJackpotPruner(model, config_list, **options)
    search = pruner.begin(total_steps=STEPS)
    for step in range(steps):
        loss = training_step(batches[step % len(batches)], model)
        loss.backward()
        search.step(loss)
    return pruner, search


@pytest.mark.parametrize("name", SEARCHES)
def test_a_step_is_that_of_the_separate_operations(
    name: str, model: ConvNet, batches: Batches, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = copy.deepcopy(model)
    fused, _ = searched(model, batches, name, 1)
    assert taken == [0]  # no zeros yet, so that no mask is soft; or masks that are hard
    monkeypatch.setattr(fused_step, "WORTH", 1 << 60)
    plain, _ = searched(twin, batches, name, 1)
    assert taken[-1] == -1
    for found, expected in zip(scores_of(fused), scores_of(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_soft_masks_are_those_of_the_new_scores(model: ConvNet, batches: Batches, taken: list[int]) -> None:
    pruner, _ = searched(model, batches, "soft masks, one budget", 10)
    assert taken[-1] == 2
    for parameter in (member for group in pruner._targets.groups for member in group.members):
        cached, parameter.cache = parameter.cache.values, None
        # Rounding of the estimated threshold is multiplied by the slope of the sigmoid.
        torch.testing.assert_close(cached, parameter.build_cache(parameter.weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_law_holds(name: str, model: ConvNet, batches: Batches, taken: list[int]) -> None:
    original = copy.deepcopy(model)
    pruner, search = searched(model, batches, name, STEPS)
    masks = search.finish()
    assert -1 not in taken
    assert name != "soft masks, one budget" or max(taken) == 2
    fresh = copy.deepcopy(original)
    statistics = {key: value for key, value in model.state_dict().items() if "running" in key}
    fresh.load_state_dict(statistics, strict=False)
    apply_masks(fresh, masks)
    model.eval(), fresh.eval()
    assert torch.equal(model(batches[0][0]), fresh(batches[0][0]))
    pruner.unwrap_model()
    for found, expected in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_same_seed_gives_the_same_masks(model: ConvNet, batches: Batches, taken: list[int]) -> None:
    twin = copy.deepcopy(model)
    name = "soft masks, one budget"
    found, expected = (searched(m, batches, name, STEPS)[1].finish() for m in (model, twin))
    assert same(found, expected)


def test_a_search_in_nni_s_loop_resumes_to_the_same_masks(
    model: ConvNet, batches: Batches, taken: list[int], tmp_path: Any
) -> None:
    config_list, options = SEARCHES["soft masks, one budget"]
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    path = tmp_path / "search.pth"

    def pruner_of(model: nn.Module, **evaluator: Any) -> LotteryJackpotPruner:
        torch.manual_seed(0)
        evaluator_ = make_evaluator(model, batches, **evaluator)
        return LotteryJackpotPruner(model, config_list, evaluator_, **options)

    _, expected = pruner_of(model).compress(max_steps=STEPS)
    stopped = pruner_of(twin)
    stopped.checkpoint_to(path, every=5)
    count = 0
    take = FusedStep.take

    def failing(step: FusedStep) -> Any:
        nonlocal count
        count += 1
        if count == 13:
            raise KeyboardInterrupt
        return take(step)

    FusedStep.take = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            stopped.compress(max_steps=STEPS)
    finally:
        FusedStep.take = take  # type: ignore[method-assign]
    resumed = pruner_of(other)
    resumed.checkpoint_to(path, every=5)
    _, found = resumed.compress(max_steps=STEPS)
    assert resumed.resumed_step == 10
    assert same(found, expected)


@pytest.mark.parametrize(
    "method", [EdgePopup.paper(), EdgePopup(momentum=0.0)], ids=["plain SGD", "no momentum"]
)
def test_other_optimizers_take_their_own_step(
    method: EdgePopup, model: ConvNet, batches: Batches, taken: list[int]
) -> None:
    pruner = LotteryJackpotPruner(model, [CONV], method=method)
    search = pruner.begin(total_steps=2)
    training_step(batches[0], model).backward()
    search.step()
    assert taken == [-1]


def test_small_networks_are_left_to_pytorch(model: ConvNet, batches: Batches) -> None:
    pruner, search = searched(model, batches, "soft masks, one budget", 1)
    assert FusedStep(search._search.optimizer, pruner._targets.groups).take() is None
