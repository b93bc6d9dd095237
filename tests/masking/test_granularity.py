"""Channel, block and pattern jackpots, and the groups and bounds of NNI's config list."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, dense_of, frozen, honours, make_evaluator
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import auto_set_denpendency_group_ids
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import ConfigListError, MaskError
from nni_jackpot.masking.granularity import Grains
from nni_jackpot.search.clock import cosine

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def searched(model: nn.Module, batches: Batches, config_list: list, **options: Any) -> LotteryJackpotPruner:
    dense = dense_of(model)
    # Batch statistics would remove the gradient of a channel's scale.
    options = {"method": EdgePopup(lr=5.0), "norm": "freeze", **options}
    pruner = LotteryJackpotPruner(model, config_list, make_evaluator(model, batches), **options)
    start = weight_masks(pruner)
    pruner.compress(18, None)
    assert frozen(model, dense)
    found = weight_masks(pruner)
    assert any(not torch.equal(start[name], found[name]) for name in start)
    for name, mask in start.items():  # the same number of weights as at the start
        assert mask.sum() == found[name].sum()
    return pruner


def weight_masks(pruner: LotteryJackpotPruner) -> dict[str, Tensor]:
    return {name: targets["weight"].bool() for name, targets in pruner.get_masks().items()}


@pytest.mark.parametrize(
    ("granularity", "grain"),
    [
        honours("granularity: default", "default", (1, 1, 1, 1)),
        honours("granularity: out_channel", "out_channel", (1, 8, 3, 3)),
        honours("granularity: in_channel", "in_channel", (12, 1, 3, 3)),
        honours("granularity: list", [1, 1, 3, 3], (1, 1, 3, 3)),
        honours("granularity: list", [4, 2, 1, 1], (4, 2, 1, 1)),
        honours("granularity: list", [[2, -1], "back", -1], (2, 8, 3, 3)),
        honours("granularity: list", [3], (1, 1, 1, 3)),
    ],
    ids=str,
)
def test_grains_are_kept_whole(model: nn.Module, batches: Batches, granularity: Any, grain: tuple) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": granularity}]
    pruner = searched(model, batches, config, init="random")
    mask = weight_masks(pruner)["conv2"]
    n_grains = mask.numel() // torch.Size(grain).numel()
    assert pruner.score_parameters()[0].numel() == n_grains
    cells = mask.reshape(
        [n for size, step in zip(mask.shape, grain, strict=True) for n in (size // step, step)]
    )
    cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n_grains, -1)
    assert torch.equal(cells.all(1), cells.any(1))
    assert int((~cells[:, 0]).sum()) == int(0.5 * n_grains)


def test_scores_of_grains_have_the_gradient_of_their_gate(model: nn.Module) -> None:
    model.double()
    reference = copy.deepcopy(model)
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = LotteryJackpotPruner(model, config)
    mask = weight_masks(pruner)["conv2"].double()
    model(X.double()).square().sum().backward()
    gate = torch.ones(12, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    masked = {
        "conv2.weight": reference.conv2.weight.detach() * (mask - 1 + gate),
        "conv2.bias": reference.conv2.bias.detach() * pruner.get_masks()["conv2"]["bias"],
    }
    torch.func.functional_call(reference, masked, X.double()).square().sum().backward()
    assert torch.allclose(pruner.score_parameters()[0].grad, gate.grad)


@pytest.mark.honours("align", "target_names: bias, that follows its weight")
def test_biases_follow_their_channels(model: nn.Module, batches: Batches) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    pruner = LotteryJackpotPruner(model, config)
    (score,) = pruner.score_parameters()
    wrapper = model.conv2._nni_wrapper
    for shift in range(12):
        with torch.no_grad():
            score.copy_(torch.arange(12.0).roll(shift).view_as(score))
        model(batches[0][0])
        # in the forward, not only in get_masks
        assert torch.equal(wrapper.bias_mask.bool(), (torch.arange(12) >= 6).roll(shift))
        assert torch.equal(wrapper.weight_mask.bool().any((1, 2, 3)), wrapper.bias_mask.bool())


@pytest.mark.honours("sparse_pattern")
@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_two_of_four(model: nn.Module, batches: Batches, init: str) -> None:
    config = [{"op_names": ["conv2", "fc"], "sparse_pattern": "2:4"}]
    pruner = searched(model, batches, config, init=init, method=EdgePopup(lr=2.0))
    masks = weight_masks(pruner)
    assert (masks["conv2"].movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    assert (masks["fc"].reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.honours("sparse_pattern")
def test_initial_pattern_keeps_the_largest_of_each_group(model: nn.Module) -> None:
    weight = model.fc.weight.detach().abs().reshape(-1, 4)
    mask = weight_masks(LotteryJackpotPruner(model, [{"op_names": ["fc"], "sparse_pattern": "1:4"}]))["fc"]
    assert torch.equal(mask.reshape(-1, 4).int().argmax(1), weight.argmax(1))
    assert mask.sum() == 9


@pytest.mark.honours("granularity: out_channel")
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 5)),
        (nn.Conv3d(4, 6, 3), torch.randn(2, 4, 5, 5, 5)),
        (nn.Linear(4, 6), torch.randn(2, 4)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_out_channels_of_every_layer(layer: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    LotteryJackpotPruner(model, config)
    out = model(x).detach()
    channels = out.movedim(1, 0).reshape(6, -1).abs().sum(1)
    assert int((channels == 0).sum()) == 3


@pytest.mark.refuses("granularity: out_channel, of transposed convolutions with groups")
def test_transposed_convolutions_with_groups_have_no_out_channels() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    with pytest.raises(ConfigListError, match="transposed convolutions with groups"):
        LotteryJackpotPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"}])


# -- groups and bounds


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.grouped((x + self.branch(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.honours(
    "dependency_group_id", "internal_metric_block", "auto_set_denpendency_group_ids", "ModelSpeedup"
)
def test_dependency_groups_and_speedup(batches: Batches) -> None:
    torch.manual_seed(0)
    model = Residual()
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    config = auto_set_denpendency_group_ids(model, config, X)
    pruner = searched(model, batches, config, init="random")
    masks = pruner.get_masks()
    channels = {name: masks[name]["weight"].bool().any(dim=(1, 2, 3)) for name in masks}
    assert torch.equal(channels["stem"], channels["branch"])
    assert len(pruner.score_parameters()) == 2
    assert all(int(kept.sum()) == 4 for kept in channels.values())
    halves = channels["stem"].view(2, 4).sum(1)  # a grouped convolution needs equally many in each group
    assert halves.tolist() == [2, 2]

    model.eval()
    masked = model(X).detach()
    pruner.unwrap_model()
    small = ModelSpeedup(model, X, masks).speedup_model().eval()
    assert small.stem.weight.shape[0] == small.branch.weight.shape[0] == 4
    assert torch.allclose(small(X), masked, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in Residual().parameters())


@pytest.mark.honours("min_sparse_ratio", "max_sparse_ratio", "global_group_id")
def test_bounds_hold_within_a_global_group(model: nn.Module) -> None:
    config = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.8, "global_group_id": 0, "max_sparse_ratio": 0.85},
        {"op_names": ["fc"], "sparse_ratio": 0.8, "global_group_id": 0, "min_sparse_ratio": 0.5},
    ]
    masks = weight_masks(LotteryJackpotPruner(model, config))
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(zeros.values()) == int(0.8 * sum(mask.numel() for mask in masks.values()))
    assert zeros["conv1"] <= int(0.85 * 72)
    assert zeros["conv2"] <= int(0.85 * 864)
    assert zeros["fc"] >= 18


@pytest.mark.honours("{bound}")
@pytest.mark.parametrize(("bound", "ratio"), [("max_sparse_ratio", 0.3), ("min_sparse_ratio", 0.7)])
def test_bounds_of_a_single_target(model: nn.Module, bound: str, ratio: float) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, bound: ratio}]
    masks = weight_masks(LotteryJackpotPruner(model, config))
    assert int((~masks["conv2"]).sum()) == int(ratio * 864)


@pytest.mark.parametrize(
    "grains",
    [
        Grains((12, 8, 3, 3)),
        Grains((12, 8, 3, 3), rows=12),
        Grains((12, 8, 3, 3), rows=12 * 9 * 2, row_dim=1),
        Grains((12, 8), rows=24, row_dim=1),
        Grains((8, 12, 3), rows=12 * 3, row_dim=0),
    ],
    ids=str,
)
def test_among_equal_scores_the_grains_kept_before_stay(grains: Grains) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(grains.shape, generator=generator)
    assert torch.equal(grains.of_rows(grains.by_row(values)), values)
    keep = grains.count // 4 // grains.rows * grains.rows
    before = grains.select(values, keep)
    assert int(before.sum()) == keep
    assert (grains.by_row(before).sum(1) == keep // grains.rows).all()
    equal = torch.zeros(grains.shape)
    assert torch.equal(grains.select(equal, keep, before), before)
    assert not torch.equal(grains.select(equal, keep), before)


@pytest.mark.honours("internal_metric_block")
def test_metric_blocks_keep_as_many_each(model: nn.Module, batches: Batches) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.75, "internal_metric_block": 4}]
    mask = weight_masks(searched(model, batches, config, method=EdgePopup(lr=2.0)))["conv2"]
    assert mask.reshape(4, -1).sum(1).tolist() == [54] * 4


@pytest.mark.honours("sparse_threshold")
def test_a_threshold_fixes_the_budget(model: nn.Module, batches: Batches) -> None:
    below = int((model.conv2.weight.abs() < 0.05).sum())
    assert 0 < below < 864
    config = [{"op_names": ["conv2"], "sparse_threshold": 0.05}]
    pruner = searched(model, batches, config, method=EdgePopup(lr=2.0))
    assert int((~weight_masks(pruner)["conv2"]).sum()) == below


@pytest.mark.honours("budget: {budget}")
@pytest.mark.parametrize("budget", ["as_configured", "global_rank", "erdos_renyi_kernel", "lamp"])
def test_budgets_share_out_the_same_total(model: nn.Module, batches: Batches, budget: str) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.7}]
    pruner = searched(model, batches, config, budget=budget, method=EdgePopup.paper(lr=2.0))
    zeros = [int((~mask).sum()) for mask in weight_masks(pruner).values()]
    configured = [int(0.7 * n) for n in (72, 864, 36)]
    assert (zeros == configured) == (budget == "as_configured")
    assert abs(sum(zeros) - sum(configured)) <= 1


# -- masks from elsewhere, swaps


@pytest.mark.honours("init: masks", "other pruners, whose masks are a start")
def test_masks_of_another_pruner_are_a_start(model: nn.Module) -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5}]
    other = L1NormPruner(model, config)
    masks = other.compress()[1]
    other.unwrap_model()
    config = [{**config[0], "granularity": "out_channel"}]
    pruner = LotteryJackpotPruner(model, config, init=masks)
    assert torch.equal(pruner.get_masks()["conv2"]["weight"], masks["conv2"]["weight"])
    pruner.unwrap_model()
    fine = LotteryJackpotPruner(model, [{"op_names": ["conv2"], "sparse_ratio": 0.5}]).get_masks()
    with pytest.raises(MaskError, match="cuts through its granularity 'out_channel'"):
        pruner.update_masks(fine)
    with pytest.raises(MaskError, match=r"init has no mask for conv2\.weight"):
        LotteryJackpotPruner(ConvNet(), config, init={})


@pytest.mark.honours("init: masks")
def test_masks_of_weight_and_bias_are_a_start(model: nn.Module) -> None:
    settings = {"weight": {"sparse_ratio": 0.5}, "bias": {"sparse_ratio": 0.5}}
    config = [{"op_names": ["conv2"], "target_settings": settings}]
    first = LotteryJackpotPruner(model, config, init="random")
    masks = first.get_masks()
    first.unwrap_model()
    second = LotteryJackpotPruner(model, config, init=masks).get_masks()
    assert all(torch.equal(second["conv2"][name], mask) for name, mask in masks["conv2"].items())


def test_masks_that_differ_within_a_group_change_nothing() -> None:
    torch.manual_seed(0)
    wish = {"sparse_ratio": 0.5, "granularity": "out_channel"}
    config = [
        {"op_names": ["grouped"], **wish},
        {"op_names": ["stem", "branch"], "dependency_group_id": 0, **wish},
    ]
    pruner = LotteryJackpotPruner(Residual(), config)
    before = weight_masks(pruner)
    flipped = {name: {"weight": 1 - mask.float()} for name, mask in before.items() if name != "stem"}
    flipped["stem"] = {"weight": before["stem"].float()}
    with pytest.raises(MaskError, match="share one dependency_group_id"):
        pruner.update_masks(flipped)
    assert all(torch.equal(mask, before[name]) for name, mask in weight_masks(pruner).items())


@pytest.mark.refuses("sparse_pattern, with swap_limit", "internal_metric_block, with swap_limit")
def test_swaps_cannot_be_limited_where_rows_keep_their_number(model: nn.Module) -> None:
    for wish in ({"sparse_pattern": "2:4"}, {"sparse_ratio": 0.5, "internal_metric_block": 2}):
        with pytest.raises(ConfigListError, match=r"swap_limit.* fc\.weight"):
            LotteryJackpotPruner(
                model, [{"op_names": ["fc"], **wish}], method=EdgePopup.paper(swap_limit=0.1)
            )
        assert not hasattr(model.fc, "_nni_wrapper")


def test_swaps_are_limited_and_annealed() -> None:
    """The gradient of a score is its weight: all initial members leave, and equally many others enter."""

    def flips(swap_limit: float | None) -> list[int]:
        model = nn.Sequential(nn.Linear(24, 36, bias=False))
        model[0].weight.data = torch.where(torch.arange(864) % 2 == 0, 2.0, -1.0).view(36, 24)
        found: list[int] = []

        def step(batch: Any, model: nn.Module) -> Tensor:
            loss = model(batch[0]).sum()
            found.append(pruner.flips)
            return loss

        config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
        evaluator = make_evaluator(model, [(torch.ones(1, 24), torch.empty(0))], step)
        pruner = LotteryJackpotPruner(
            model, config, evaluator, method=EdgePopup.paper(lr=1.0, swap_limit=swap_limit)
        )
        masks = pruner.compress(18, held_out=0)[1]
        assert int((masks["0"]["weight"] == 0).sum()) == 432
        return found

    assert flips(None) == [0, 864] + 16 * [0]
    # The same number enters and leaves at each step: 92 of the 432 in total, so that candidates never run out.
    assert flips(0.02) == [0] + [2 * math.ceil(0.02 * cosine(step / 18) * 432) for step in range(17)]


@pytest.mark.honours("init: {criterion}")
@pytest.mark.parametrize("criterion", ["snip", "taylor", "grasp", "obd", "wanda", "sparsegpt"])
def test_search_from_criteria_that_need_data(model: nn.Module, batches: Batches, criterion: str) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.7}]
    pruner = searched(model, batches, config, init=criterion, init_batches=2, method=EdgePopup(lr=2.0))
    assert [int((~mask).sum()) for mask in weight_masks(pruner).values()] == [50, 604]
    with pytest.raises(ValueError, match=f"init='{criterion}' takes (gradients|activations)"):
        LotteryJackpotPruner(ConvNet(), config, init=criterion)
