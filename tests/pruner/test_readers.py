"""All code that reads a weight, through any holder of the parameter, gets the masked weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import dense_of
from law import check_law, check_refusal
from nni.compression.base.setting import PruningSetting
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.errors import MaskError

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
EMBEDDING = [{"op_types": ["Embedding"], "sparse_ratio": 0.5}]
TOKENS = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]


class Reads(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.qkv.weight, self.qkv.bias).relu())


class ReadsAndCalls(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.qkv(x) + x @ self.qkv.weight.t()).relu())


class Adds(nn.Module):
    """Multiplies by the sum of two weights: autograd gives both the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight + self.b.weight)


class AddsInside(nn.Linear):
    """A subclass of a layer whose own forward uses the weight twice, and a second parameter with it."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.other = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.other.weight) + F.linear(x, self.weight)


class Language(nn.Module):
    """An embedding and the layer that gives the logits, with one weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embedding = nn.Embedding(10, 16)
        if how != "read":
            self.head = nn.Linear(16, 10, bias=how == "bias")
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(1).tanh()
        return F.linear(x, self.embedding.weight) if self.how == "read" else self.head(x)


class ThreeTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers[1].weight = self.layers[2].weight = self.layers[0].weight
        self.scale = self.layers[0].weight  # a parameter of the model itself

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x + self.scale.sum()


class TwoNames(nn.Module):
    """Has one layer both as an attribute and within a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(self.conv, nn.ReLU(), nn.Conv2d(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=4)


ADDS_INSIDE = [{"op_types": ["AddsInside", "Linear"], "sparse_ratio": 0.5}]
VECTORS, WORDS = torch.randn(3, 8), torch.arange(12).view(3, 4) % 10
CASES = {
    "a weight that is read": (Reads, LINEAR, VECTORS),
    "a weight that is read and called": (ReadsAndCalls, LINEAR, VECTORS),
    "two weights that are added": (Adds, LINEAR, VECTORS),
    "a weight that is used twice": (lambda: nn.Sequential(AddsInside()), ADDS_INSIDE, VECTORS),
    "attention": (attention, LINEAR, torch.randn(2, 3, 8)),
    "Swin": (swin, LINEAR, torch.randn(1, 3, 16, 16)),
    "an embedding that is read": (lambda: Language("read"), TOKENS, WORDS),
    "an embedding and a head": (lambda: Language("called"), TOKENS, WORDS),
    "an embedding and a head with a bias": (lambda: Language("bias"), TOKENS, WORDS),
    "a head that is tied": (lambda: Language("called"), LINEAR, WORDS),
    "an embedding that is tied": (lambda: Language("called"), EMBEDDING, WORDS),
    "three layers and their model": (ThreeTied, LINEAR, VECTORS),
    "a layer with two names": (TwoNames, CONV, torch.randn(2, 1, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_searched_is_what_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model, config_list, inputs = CASES[case]
    monkeypatch.setitem(PruningSetting.registry, "AddsInside", PruningSetting.default_setting)
    # The fast path of the encoder layer is another kernel than the layers that it consists of.
    check_law(make_model, config_list, (inputs,), exact=make_model is not attention)


def test_an_output_projection_that_attention_reads_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "NonDynamicallyQuantizableLinear"
    monkeypatch.setitem(PruningSetting.registry, kind, PruningSetting.default_setting)
    check_law(attention, [{"op_types": [kind], "sparse_ratio": 0.5}], (torch.randn(2, 3, 8),), exact=False)


def test_one_parameter_has_one_budget_and_stays_one() -> None:
    model = Language("called")
    pruner = LotteryJackpotPruner(model, TOKENS)
    assert len(pruner.score_parameters()) == 1
    masks = pruner.get_masks()
    assert torch.equal(masks["embedding"]["weight"], masks["head"]["weight"])
    assert int((model.head.weight == 0).sum()) == 80
    assert torch.equal(model.head.weight, model.embedding.weight)
    pruner.unwrap_model()
    assert model.head.weight is model.embedding.weight


def test_different_wishes_for_one_parameter_are_refused() -> None:
    config = [
        {"op_types": ["Linear"], "sparse_ratio": 0.5},
        {"op_types": ["Embedding"], "sparse_ratio": 0.9},
    ]
    tokens = torch.arange(4).view(1, 4)
    check_refusal(lambda: Language("called"), config, (tokens,), match=r"embedding\.weight and head\.weight")


def test_masks_of_one_parameter_that_differ_are_refused() -> None:
    model = Language("called")
    pruner = LotteryJackpotPruner(model, TOKENS)
    masks = pruner.get_masks()
    flipped = {"embedding": masks["embedding"], "head": {"weight": 1 - masks["head"]["weight"]}}
    with pytest.raises(MaskError, match="one parameter"):
        pruner.update_masks(flipped)
    pruner.update_masks({"head": flipped["head"]})
    assert torch.equal(pruner.get_masks()["embedding"]["weight"], flipped["head"]["weight"])


def test_a_module_with_two_names_is_selected_by_either() -> None:
    for name in ("conv", "body.0"):
        pruner = LotteryJackpotPruner(TwoNames(), [{"op_names": [name], "sparse_ratio": 0.5}])
        assert list(pruner.get_masks()) == ["conv"]


def test_unwrapping_gives_back_the_parameters_that_an_optimizer_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    own = dict(model.named_parameters())
    pruner = LotteryJackpotPruner(model, LINEAR)
    model(torch.randn(4, 8)).sum().backward()
    pruner.unwrap_model()
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    before = dense_of(model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in dense_of(model).items())


@pytest.mark.parametrize("layer", ["lstm", "list", "memory"])
def test_parameters_that_are_read_past_their_modules_are_refused(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            if layer == "lstm":
                self.rnn = nn.LSTM(4, 4)
            elif layer == "list":
                self.weights = [self.fc.weight]
            else:
                self.view = nn.Parameter(self.fc.weight.data[:2])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    setting = {"weight_hh_l0": PruningSetting.default_setting["weight"]}
    monkeypatch.setitem(PruningSetting.registry, "LSTM", setting)
    kind = "LSTM" if layer == "lstm" else "Linear"
    words = {"lstm": "_flat_weights of a LSTM", "list": "weights of a Holds", "memory": "in one memory"}
    config = [{"op_types": [kind], "sparse_ratio": 0.5}]
    check_refusal(Holds, config, (torch.randn(2, 4),), match=words[layer])


def test_a_weight_that_is_masked_cannot_be_assigned_to() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    LotteryJackpotPruner(model, LINEAR)
    with pytest.raises(AttributeError, match=r"unwrap_model\(\)"):
        model[0].weight = torch.zeros(4, 4)


# -- shared gradients


@pytest.mark.parametrize("make_model", [Adds, AddsInside])
def test_gradients_that_autograd_shares_are_not_written_over(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PruningSetting.registry, "AddsInside", PruningSetting.default_setting)
    torch.manual_seed(0)
    model, x = nn.Sequential(make_model()), torch.randn(5, 8)
    dense = copy.deepcopy(model)
    pruner = LotteryJackpotPruner(model, [{"op_names": _linear(model), "sparse_ratio": 0.5}])
    apply_masks(dense, pruner.get_masks())
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    scores = dict(zip(_linear(model), pruner.score_parameters(), strict=True))
    frozen = {n.replace("_nni_wrapper.", ""): p for n, p in model.named_parameters()}
    for name, score in scores.items():
        expected = dense.get_submodule(name).weight.grad * frozen[f"{name}.weight"]
        assert torch.allclose(score.grad, expected, rtol=1e-5, atol=1e-6)


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
