"""A search method from outside the package: settings, and what training sees of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import Batches, ConvNet, dense_of, frozen, make_evaluator, same
from torch import Tensor

from nni_jackpot import LotteryJackpotPruner, Method, register_method
from nni_jackpot.masking.masked_parameter import MaskedParameter
from nni_jackpot.masking.methods import METHODS
from nni_jackpot.runtime.settings import SettingError, between, option

CONFIG_LIST = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]


class Leaky(MaskedParameter):
    """Training sees a part of each pruned weight as well."""

    leak = 0.0

    def read(self, weight: Tensor, is_training: bool, may_write: bool = False) -> Tensor:
        masked = self.masked(weight)
        if not (is_training and torch.is_grad_enabled()):
            return masked
        return masked + self.leak * (weight - masked).detach()


class Leaking(Leaky):
    leak = 0.5


@pytest.fixture
def leaky() -> Iterator[None]:
    @register_method("leaky")
    @dataclass(frozen=True, kw_only=True)
    class LeakyMethod(Method):
        """Edge-popup whose pruned weights leak in training."""

        parameter_class = Leaking

        share: float = option("a setting of its own", between(0, 1), 0.25)

    yield
    del METHODS._objects["leaky"], METHODS._origins["leaky"]


@pytest.mark.usefixtures("leaky")
def test_an_outside_method_searches_by_its_name(model: ConvNet, batches: Batches) -> None:
    dense = dense_of(model)
    pruner = LotteryJackpotPruner(model, CONFIG_LIST, make_evaluator(model, batches), method="leaky")
    start = pruner.get_masks()
    x = torch.randn(4, 1, 8, 8)
    assert not torch.equal(model.conv1(x), model.conv1.eval()(x))
    _, masks = pruner.compress(max_steps=20)
    assert not same(start, masks)
    assert [int((m["weight"] == 0).sum()) for m in masks.values()] == [57, 691]
    assert frozen(model, dense)


@pytest.mark.usefixtures("leaky")
def test_its_settings_are_checked_and_its_name_is_taken() -> None:
    kind = METHODS["leaky"]
    assert kind().suited_to(has_batch_norm=True).lr == 0.003
    with pytest.raises(SettingError, match=r"share: found 2 \(int\), allowed: a number >= 0 and <= 1"):
        kind(share=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="the method 'leaky' is registered already"):
        register_method("leaky")(type("Other", (Method,), {}))
    with pytest.raises(ValueError, match=r"method must be one of .*leaky, got 'leeky'; did you mean leaky\?"):
        METHODS.find("leeky")
