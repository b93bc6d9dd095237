"""Combinations with NNI's other compressors: scheduled pruners, distillers, quantizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Batches, dense_of, frozen, make_evaluator, training_step, zeros
from nni.compression import quantization
from nni.compression.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner
from torch import Tensor, nn

from nni_jackpot import EdgePopup, LotteryJackpotPruner
from nni_jackpot.errors import ConfigListError

CONVS: list[dict[str, Any]] = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.7}]
EXPECTED = {"conv1": 50, "conv2": 604}


@pytest.mark.honours("{scheduled.__name__}")
@pytest.mark.parametrize("scheduled", [LinearPruner, AGPPruner])
@pytest.mark.parametrize("init", ["magnitude", "snip", "random"])
def test_sparsity_that_grows(model: nn.Module, batches: Batches, scheduled: type, init: str) -> None:
    dense = dense_of(model)
    grown: list[int] = []
    schedules: list[Any] = []

    def step(batch: Any, model: nn.Module) -> Tensor:
        loss = training_step(batch, model)
        if schedules:  # SNIP takes a separate step
            grown.append(zeros(schedules[0].bound_pruner)["conv2"])
        return loss

    pruner = LotteryJackpotPruner(
        model, CONVS, make_evaluator(model, batches, step), init=init, method=EdgePopup(lr=2.0)
    )
    target = zeros(pruner)
    schedule = scheduled(pruner, interval_steps=3, total_times=4)
    schedules.append(schedule)
    _, masks = schedule.compress(18, None)
    assert {name: int((m["weight"] == 0).sum()) for name, m in masks.items()} == target == EXPECTED
    assert grown[0] == 0
    assert grown == sorted(grown)
    assert len(set(grown)) == 5
    schedule.unwrap_model()
    assert frozen(model, dense)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.refuses("{scheduled.__name__}, from given masks")
@pytest.mark.parametrize("scheduled", [LinearPruner, AGPPruner])
def test_given_masks_have_no_schedule(model: nn.Module, batches: Batches, scheduled: type) -> None:
    masks = LotteryJackpotPruner(copy.deepcopy(model), CONVS).get_masks()
    pruner = LotteryJackpotPruner(model, CONVS, make_evaluator(model, batches), init=masks)
    with pytest.raises(ConfigListError, match="cannot be scheduled where the search starts from given masks"):
        scheduled(pruner, interval_steps=3, total_times=4).compress(18, None)


@pytest.mark.refuses("AGPPruner, after a search without a schedule")
def test_a_schedule_comes_with_the_first_search(model: nn.Module, batches: Batches) -> None:
    pruner = LotteryJackpotPruner(model, CONVS, make_evaluator(model, batches))
    pruner.compress(2, None)
    assert pruner._targets.importance is None  # which takes as much memory as the weights
    with pytest.raises(ConfigListError, match="nor after a search without a schedule"):
        AGPPruner(pruner, interval_steps=3, total_times=4).compress(18, None)


@pytest.mark.honours("{distiller_class.__name__}", "{quantizer_name}")
@pytest.mark.parametrize(
    ("distiller_class", "quantizer_name"),
    [
        *((DynamicLayerwiseDistiller, name) for name in quantization.__all__),
        (Adaptive1dLayerwiseDistiller, "QATQuantizer"),
    ],
)
def test_distilled_and_quantized(
    model: nn.Module, batches: Batches, distiller_class: type, quantizer_name: str
) -> None:
    dense, teacher = dense_of(model), copy.deepcopy(model)
    distiller = distiller_class(
        model,
        [{"op_names": ["fc"], "lambda": 0.1, "apply_method": "mse"}],
        make_evaluator(model, batches),
        teacher,
        lambda batch, teacher: teacher(batch[0]),
    )
    if distiller_class is Adaptive1dLayerwiseDistiller:
        distiller.track_forward(batches[0][0])
    pruner = LotteryJackpotPruner.from_compressor(distiller, CONVS, method=EdgePopup(lr=2.0))
    start = pruner.get_masks()
    # NNI's DoReFa quantizes outputs of activations only.
    outputs = [] if quantizer_name == "DoReFaQuantizer" else ["_output_"]
    quantizer = getattr(quantization, quantizer_name).from_compressor(
        pruner,
        [
            {
                "op_names": ["conv1", "conv2"],
                "target_names": ["weight", *outputs],
                "quant_dtype": "int8",
                "quant_scheme": "symmetric",
            }
        ],
    )
    _, calibration = quantizer.compress(18, None)
    assert all(calibration[name]["weight"]["scale"].isfinite().all() for name in EXPECTED)
    found = pruner.get_masks()
    assert zeros(pruner) == EXPECTED
    assert not torch.equal(found["conv2"]["weight"], start["conv2"]["weight"])
    quantizer.unwrap_model()
    assert frozen(model, dense)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.refuses("other pruners, of the same targets in one chain")
def test_a_target_of_an_earlier_pruner_is_refused(model: nn.Module) -> None:
    earlier = L1NormPruner(model, CONVS)
    masks = earlier.compress()[1]
    with pytest.raises(ConfigListError, match=r"conv\d.weight is pruned by an earlier compressor"):
        LotteryJackpotPruner.from_compressor(earlier, CONVS)
    channels = [{**CONVS[0], "granularity": "out_channel"}]
    assert zeros(LotteryJackpotPruner(model, channels, init=masks)) == zeros(earlier)
