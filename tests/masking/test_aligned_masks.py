"""Masks that follow others: of biases, inputs and outputs, and the ways to apply them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Batches, honours, refuses
from nni.compression.base.setting import PruningSetting
from test_granularity import searched, weight_masks
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import ConfigListError

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.honours("align")
def test_align_to_another_module(model: nn.Module, batches: Batches) -> None:
    follow = {"align": {"module_name": "conv2", "target_name": "weight", "dims": [0]}}
    config = [
        {"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "out_channel"},
        {"op_names": ["bn2"], "target_settings": {"weight": follow, "bias": follow}},
    ]
    pruner = searched(model, batches, config)
    masks = pruner.get_masks()
    kept = masks["conv2"]["weight"].bool().any(dim=(1, 2, 3))
    assert torch.equal(masks["bn2"]["weight"].bool(), kept)
    assert torch.equal(masks["bn2"]["bias"].bool(), kept)


@pytest.mark.honours(
    "target_names: _input_, that follows a weight",
    "target_names: _output_, that follows a weight",
    "granularity: per_channel, of inputs and outputs",
)
@pytest.mark.parametrize("granularity", ["in_channel", "out_channel"])
def test_outputs_and_inputs_follow_a_weight(model: nn.Module, batches: Batches, granularity: str) -> None:
    def follow(dim: int) -> dict[str, Any]:
        return {
            "align": {"module_name": None, "target_name": "weight", "dims": [dim]},
            "granularity": "per_channel",
        }

    config = [
        {
            "op_names": ["conv2"],
            "sparse_ratio": 0.5,
            "granularity": granularity,
            "target_names": ["weight", "bias", "_output_", "_input_"],
            "target_settings": {"_output_": follow(0), "_input_": follow(1)},
        }
    ]
    pruner = searched(model, batches, config)
    masks = pruner.get_masks()["conv2"]
    weight = masks["weight"].bool()
    assert torch.equal(masks["_output_0"].flatten().bool(), weight.any(dim=(1, 2, 3)))
    assert torch.equal(masks["_input_0"].flatten().bool(), weight.any(dim=(0, 2, 3)))


def following(layer: str, target: str, dims: list[int], **settings: Any) -> list[dict[str, Any]]:
    """Prune a layer's output channels, and have an input or output follow its weight."""
    align = {"module_name": None, "target_name": "weight", "dims": dims}
    wish = {"op_names": [layer], "sparse_ratio": 0.5, "granularity": "out_channel"}
    return [
        {
            **wish,
            "target_names": ["weight", target],
            "target_settings": {target: {"align": align, **settings}},
        }
    ]


@pytest.mark.parametrize(
    "settings",
    [
        honours("granularity: default, of inputs and outputs", {"granularity": "default"}),
        honours("granularity: per_channel, of inputs and outputs", {}),
        honours("granularity: list, of inputs and outputs", {"granularity": [-1, 1, -1, -1]}),
        honours("granularity: list, of inputs and outputs", {"granularity": [[-1, 1], "back", -1]}),
        honours("granularity: list, of inputs and outputs", {"granularity": [[1, -1, -1], "front", -1]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["_output_", "_output_0"])
def test_outputs_follow_by_channel(model: nn.Module, settings: dict[str, Any], target: str) -> None:
    seen = []
    model.bn2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pruner = LotteryJackpotPruner(model, following("conv2", target, [0], **settings))
    model(X)
    kept = weight_masks(pruner)["conv2"].any(dim=(1, 2, 3))
    assert torch.equal(pruner.get_masks()["conv2"]["_output_0"], kept.float().view(1, 12, 1, 1))
    assert torch.equal(seen[0].bool().any(dim=0).any(-1).any(-1), kept)


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        refuses("granularity: out_channel, of inputs and outputs", "_output_", {"granularity": "out_channel"}, "is for weights: leave granularity out, or write 'per_channel'"),
        refuses("granularity: in_channel, of inputs and outputs", "_input_", {"granularity": "in_channel"}, "is for weights: leave granularity out, or write 'per_channel'"),
        refuses("granularity: list, of inputs and outputs but not by channel", "_output_", {"granularity": [1]}, r"=\[1\] is not by channel, which is dimension 1"),
        ("_output_", {"granularity": [-1, 1]}, "is not by channel"),
        ("_output_", {"granularity": [[1, -1], "front", -1]}, "is not by channel"),
        ("_output_", {"granularity": [[-1, 1], "back"]}, "is not by channel"),  # pads with 1
        ("_output_", {"granularity": [2, -1, -1, -1]}, "is not by channel"),
        ("_output_", {"granularity": [-1, -1, -1, -1]}, "is not by channel"),
        ("_output_", {"granularity": [-1, 5, -1, -1]}, "does not divide its 12 channels"),
        ("_output_", {"granularity": [-1, 2, -1, -1]}, r"dims \[0\] of conv2.weight, .* does not give its 12 channels at granularity"),
        ("_output_", {"granularity": []}, "must be a list of block sizes, each positive or -1"),
        ("_output_", {"granularity": [-1, 0, -1, -1]}, "must be a list of block sizes, each positive or -1"),
        ("_output_", {"granularity": [[-1, 1], "middle", -1]}, "'front' or 'back'"),
        refuses("align, that does not fit", "_input_", {}, r"dims \[0\] of conv2.weight, .* does not give its 8 channels"),
        ("_output_1", {}, "target_settings of .* must have '_output_'"),
    ],
)  # fmt: skip
def test_inputs_and_outputs_follow_in_no_other_way(
    model: nn.Module, target: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigListError, match=rf"^conv2(\.{target})?.*{words}"):
        LotteryJackpotPruner(model, following("conv2", target, [0], **settings))
    assert not hasattr(model.conv2, "_nni_wrapper")


def test_align_of_inputs_and_outputs_is_to_one_dimension(model: nn.Module) -> None:
    with pytest.raises(ConfigListError, match=r"_output_0: align must name one of .* got \[0, 1\]"):
        LotteryJackpotPruner(model, following("conv2", "_output_", [0, 1]))
    config = following("conv2", "_output_", [0])
    config[0]["target_names"].append("_output_7")
    with pytest.raises(ConfigListError, match="_output_7: a Conv2d has no more than _input_0 and _output_0"):
        LotteryJackpotPruner(model, config)


@pytest.mark.parametrize("granularity", [None, "per_channel", [-1, -1, 1], [[1], "front", -1]])
@pytest.mark.parametrize("length", [3, 5, 6])
def test_features_of_sequences_are_channels(granularity: Any, length: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    settings = {} if granularity is None else {"granularity": granularity}
    pruner = LotteryJackpotPruner(model, following("0", "_output_", [0], **settings))
    kept = weight_masks(pruner)["0"].any(1)
    assert torch.equal(model(torch.randn(7, length, 4)).bool().any(0).any(0), kept)
    with pytest.raises(ConfigListError, match="not by channel, which is dimension -1"):
        LotteryJackpotPruner(
            nn.Sequential(nn.Linear(4, 6)), following("0", "_output_", [0], granularity=[-1, 1, -1])
        )


def test_channels_of_transposed_convolutions_and_embeddings() -> None:
    layers = (
        (nn.ConvTranspose2d(4, 6, 3), [1], torch.randn(2, 4, 5, 5)),
        (nn.Embedding(9, 6), [1], torch.arange(8).view(2, 4)),
    )
    for layer, dims, x in layers:
        config = following("0", "_output_", dims)
        config[0]["granularity"] = "out_channel" if x.is_floating_point() else "in_channel"
        model = nn.Sequential(layer)
        pruner = LotteryJackpotPruner(model, config)
        y = model(x).movedim(1, -1) if x.is_floating_point() else model(x)
        kept = weight_masks(pruner)["0"].movedim(1, 0).flatten(1).any(1)
        assert kept.sum() == 3
        assert torch.equal(y.reshape(-1, 6).bool().any(0), kept)
    with pytest.raises(ConfigListError, match=r"0\._input_0: the input of an embedding is indices"):
        LotteryJackpotPruner(nn.Sequential(nn.Embedding(9, 6)), following("0", "_input_", [0]))


class Block(nn.Module):
    """Has no parameter of its own, and more than one output, the first of which has channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x + self.dense(x).relu(), 0


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.embedding(x))[0]


@pytest.mark.parametrize(
    ("granularity", "words"),
    [
        (None, None),
        ([-1, -1, 1], None),
        ([[1], "front", -1], None),
        ([1], "must be -1, along the batch too"),
        ([-1, 1, 1], "must be -1, along the batch too"),
        ("out_channel", "is for weights"),
    ],
    ids=str,
)
def test_outputs_of_modules_that_nni_does_not_know(
    granularity: Any, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NNI's tutorial on BERT: a network without some channels of its embedding
    align = {"module_name": "embedding", "target_name": "weight", "dims": [1]}
    monkeypatch.setitem(
        PruningSetting.registry, "Block", {"_output_": {"align": align, "apply_method": "mul"}}
    )
    output: dict[str, Any] = {"align": align}
    if granularity is not None:
        output["granularity"] = granularity
    config = [
        {"op_types": ["Embedding"], "sparse_ratio": 0.5, "granularity": [-1, 1]},
        {"op_names": ["block"], "target_names": ["_output_"], "target_settings": {"_output_": output}},
        {
            "op_names": ["block.dense"],
            "target_names": ["weight"],
            "target_settings": {"weight": {"granularity": "out_channel", "align": align}},
        },
    ]
    model = Sequences()
    if words is not None:
        with pytest.raises(ConfigListError, match=f"block._output_0.*{words}"):
            LotteryJackpotPruner(model, config)
        return
    pruner = LotteryJackpotPruner(model, config)
    y = model(torch.arange(8).view(2, 4))
    masks = pruner.get_masks()
    kept = masks["embedding"]["weight"].bool().any(0)
    assert torch.equal(masks["block.dense"]["weight"].bool(), kept.view(6, 1).expand(6, 6))
    assert torch.equal(y.bool().any(0).any(0), kept)


@pytest.mark.honours("apply_method: {method}, of weights")
@pytest.mark.parametrize("method", ["mul", "bypass"])
def test_apply_methods_of_weights(model: nn.Module, method: str) -> None:
    dense = copy.deepcopy(model)
    pruner = LotteryJackpotPruner(
        model, [{"op_names": ["conv2"], "sparse_ratio": 0.5, "apply_method": method}]
    )
    mask = weight_masks(pruner)["conv2"]
    assert int((~mask).sum()) == 432
    if method == "mul":
        dense.conv2.weight.data.mul_(mask)
    assert torch.equal(model(X), dense(X))


@pytest.mark.honours("apply_method: {method}, of inputs and outputs")
@pytest.mark.parametrize("method", ["mul", "add", "bypass"])
def test_apply_methods_of_outputs(model: nn.Module, method: str) -> None:
    follow = {
        "align": {"module_name": None, "target_name": "weight", "dims": [0]},
        "granularity": "per_channel",
    }
    wish = {"op_names": ["fc"], "sparse_ratio": 0.5, "granularity": "out_channel", "apply_method": "bypass"}
    targets = {"_output_": {**follow, "apply_method": method}}
    model.eval()
    dense = model(X)
    pruner = LotteryJackpotPruner(
        model, [{**wish, "target_names": ["weight", "_output_"], "target_settings": targets}]
    )
    kept = weight_masks(pruner)["fc"].any(1)
    assert kept.tolist().count(False) == 1
    # NNI adds -1000 where the mask is zero.
    expected = {"mul": dense * kept, "add": dense - 1000.0 * ~kept, "bypass": dense}[method]
    assert torch.equal(model(X), expected)
