"""Weights that cannot be masked for all their readers are refused by name; the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CONFIG_LIST, ConvNet, make_evaluator
from law import check_law, check_refusal
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from nni_jackpot import LotteryJackpotPruner
from nni_jackpot.errors import ConfigListError, TargetWithoutParametersError
from nni_jackpot.nni_bridge.frozen_model import FrozenModel

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def with_buffer() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def with_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


class LinearOfProperty(nn.Linear):
    """Computes its weight from another parameter."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.raw = nn.Parameter(self._parameters.pop("weight").detach())

    @property
    def weight(self) -> Tensor:
        return self.raw * 2

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = value


LinearOfProperty.__name__ = "Linear"


def damaged(value: float) -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 2] = value
    return layer


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


def in_memory_of(make: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def layer() -> nn.Module:
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
        return layer

    return layer


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: weight_norm(nn.Linear(4, 4)), "remove_weight_norm"),
    "weight norm of a dimension": (lambda: weight_norm(nn.Linear(4, 4), dim=1), "weight_g, weight_v"),
    "spectral norm": (lambda: spectral_norm(nn.Linear(4, 4)), "remove_spectral_norm"),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        r"prune\.remove\(module, 'weight'",
    ),
    "pruned at random": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "weight_orig"),
    "a buffer": (with_buffer, "a buffer"),
    "an attribute": (with_attribute, "an attribute"),
    "a property": (LinearOfProperty, "a property"),
}
VALUES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyLinear(4), "no shape yet: run one forward"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "on the meta device"),
    "NaN": (lambda: damaged(float("nan")), "NaN or infinite"),
    "infinite": (lambda: damaged(float("inf")), "NaN or infinite"),
    "of inference mode": (in_inference_mode, "inference_mode"),
    "float8": (in_memory_of(lambda w: w.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "float8 of another kind": (in_memory_of(lambda w: w.to(torch.float8_e5m2)), "float8_e5m2"),
    "sparse": (in_memory_of(lambda w: w.to_sparse()), "dense weights"),
    "sparse gradients": (lambda: nn.Embedding(4, 4, sparse=True), "sparse=True"),
    "a norm that is kept": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", [*COMPUTED, *VALUES])
def test_a_weight_that_takes_no_mask_is_refused_by_name(case: str) -> None:
    layer, words = {**COMPUTED, **VALUES}[case]
    config = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]

    def make_model() -> nn.Module:
        return nn.ModuleList([nn.Linear(4, 4), layer()])

    check_refusal(make_model, config, match=rf"1\.weight.*{words}")


@pytest.mark.parametrize(
    "parametrized",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.weight_norm(layer, dim=1),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: parametrizations.orthogonal(layer),
    ],
    ids=["weight norm", "of a dimension", "spectral norm", "orthogonal"],
)
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(1, 8, 3)], ids=["linear", "conv"]
)
def test_a_parametrized_weight_is_searched_as_it_comes_out(
    layer: Callable[[], nn.Module], parametrized: Callable[[nn.Module], nn.Module]
) -> None:
    config = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}]
    inputs = torch.randn(2, 1, 8, 8)
    check_law(lambda: nn.Sequential(parametrized(layer()), nn.Tanh()), config, (inputs,))


def test_a_parametrized_weight_has_no_gradient_for_snip() -> None:
    model = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 3)))
    evaluator = make_evaluator(model, [(torch.randn(2, 64), torch.tensor([0, 1]))])
    with pytest.raises(ConfigListError, match=r"1\.weight.*snip"):
        LotteryJackpotPruner(model, LINEAR, evaluator, init="snip")
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_a_parametrized_type_is_excluded_by_its_plain_name() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Conv2d(1, 1, 1))
    config = [{"op_names": ["0", "1"], "exclude_op_types": ["Linear"], "sparse_ratio": 0.0}]
    assert list(LotteryJackpotPruner(model, config).get_masks()) == ["1"]


def test_a_second_pruner_on_a_wrapped_model_is_told_to_unwrap() -> None:
    model = ConvNet()
    first = LotteryJackpotPruner(model, CONFIG_LIST)
    masks = first.get_masks()
    with pytest.raises(ConfigListError, match=r"unwrap_model\(\)"):
        LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert first.get_masks().keys() == masks.keys()
    first.unwrap_model()
    LotteryJackpotPruner(model, CONFIG_LIST)


@pytest.mark.parametrize("failing", ["wrap", "frozen"])
def test_whatever_fails_in_the_constructor_the_model_is_as_it_was(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fail_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2 or failing == "frozen":
            raise OSError("in the midst")
        original(*args)

    owner, name = (ModuleWrapper, "wrap") if failing == "wrap" else (FrozenModel, "freeze")
    original = getattr(owner, name)
    model = ConvNet()
    own, x = dict(model.named_parameters()), torch.randn(2, 1, 8, 8)
    before = model.eval()(x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_second)
        with pytest.raises(OSError, match="in the midst"):
            LotteryJackpotPruner(model, CONFIG_LIST)
    assert all(p is own[n] and p.requires_grad for n, p in model.named_parameters())
    assert [type(module).__mro__[1] for module in model.modules()].count(nn.Conv2d) == 0
    assert torch.equal(model(x), before)
    LotteryJackpotPruner(model, CONFIG_LIST)


@pytest.mark.parametrize("init", [3, None, [torch.ones(3)]])
def test_a_start_is_a_name_a_criterion_or_masks(init: Any) -> None:
    with pytest.raises(ValueError, match="init must be one of magnitude"):
        LotteryJackpotPruner(ConvNet(), CONFIG_LIST, init=init)


@pytest.mark.parametrize("found", [None, 3, {}, "another shape"])
def test_a_criterion_that_gives_no_importance_is_refused(found: Any) -> None:
    def broken(weights: Any) -> Any:
        return {key: torch.ones(3) for key in weights} if found == "another shape" else found

    model = ConvNet()
    with pytest.raises(
        ValueError, match=r"the criterion broken must return a tensor of shape \[8, 1, 3, 3\]"
    ):
        LotteryJackpotPruner(model, CONFIG_LIST, init=broken)
    LotteryJackpotPruner(model, CONFIG_LIST)


def test_generated_masks_are_those_that_stand() -> None:
    pruner = LotteryJackpotPruner(ConvNet(), CONFIG_LIST)
    generated, masks = pruner.generate_masks(), pruner.get_masks()
    assert torch.equal(generated["conv1"]["weight"], masks["conv1"]["weight"])


def test_a_property_is_not_a_parameter() -> None:
    model = nn.Sequential(LinearOfProperty())
    assert F.linear(torch.ones(1, 4), model[0].weight).shape == (1, 4)
    with pytest.raises(TargetWithoutParametersError):
        LotteryJackpotPruner(model, LINEAR)
