"""Every conversion of a masked model gives the masked model's outputs, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Batches, ConvNet, make_evaluator
from nni.compression.pruning import LevelPruner
from nni.compression.quantization import PtqQuantizer, QATQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import EdgePopup, LotteryJackpotPruner, apply_masks, load_masks, save_masks
from nni_jackpot.errors import MaskError, SpeedupError
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.speedup import check_semi_structured, semi_structured, shrink, sparse_csr
from nni_jackpot.speedup.outputs import check_same
from nni_jackpot.storage.ticket import load_ticket, save_ticket

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def masks_of(model: nn.Module, config_list: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return initial masks, and restore the model."""
    return dict(LotteryJackpotPruner(copy.deepcopy(model), config_list).get_masks())


def masked(model: nn.Module, masks: dict[str, dict[str, Any]]) -> nn.Module:
    return apply_masks(copy.deepcopy(model), masks).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@torch.no_grad()
def close(a: nn.Module, b: nn.Module, *inputs: Tensor) -> None:
    torch.testing.assert_close(a(*inputs), b(*inputs), rtol=1e-4, atol=1e-5)


# --- channels


class TestShrink:
    @pytest.fixture
    def resnet(self) -> nn.Module:
        torch.manual_seed(0)
        model = ResNet(depth=8, width=8, num_classes=10, in_channels=1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.bias, -1, 1)
                nn.init.uniform_(module.running_mean, -1, 1)
        return model

    @staticmethod
    def config_list(model: nn.Module, with_norm: bool) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = [
            {"op_names_re": [r"stage.*conv1"], "sparse_ratio": 0.5, "granularity": "out_channel"}
        ]
        for name, _ in model.named_modules() if with_norm else ():
            if name.startswith("stage") and name.endswith("bn1"):
                source = {"module_name": name[:-3] + "conv1", "target_name": "weight", "dims": [0]}
                settings = {target: {"align": source} for target in ("weight", "bias")}
                result.append({"op_names": [name], "target_settings": settings})
        return result

    def test_is_smaller_and_the_same(self, resnet: nn.Module) -> None:
        before = state(resnet)
        masks = masks_of(resnet, self.config_list(resnet, with_norm=True))
        masks_before = copy.deepcopy(masks)
        small = shrink(resnet, masks, X)
        assert small.stage2[0].conv1.weight.shape == (8, 8, 3, 3)
        assert small.stage2[0].conv2.weight.shape == (16, 8, 3, 3)
        close(small, masked(resnet, masks), X)
        assert not any(module.training for module in small.modules())
        assert unchanged(resnet, before)
        assert resnet.training
        assert resnet.stage2[0].conv1.out_channels == 16
        for name, targets in masks.items():
            assert torch.equal(targets["weight"], masks_before[name]["weight"])

    def test_zeros_within_channels_stay(self, resnet: nn.Module) -> None:
        masks = masks_of(resnet, self.config_list(resnet, with_norm=True))
        masks["stage3.0.conv2"] = {"weight": (torch.rand(32, 32, 3, 3) > 0.5).float()}
        close(shrink(resnet, masks, X), masked(resnet, masks), X)

    def test_what_is_left_of_a_channel_is_told(self, resnet: nn.Module) -> None:
        masks = masks_of(resnet, self.config_list(resnet, with_norm=False))
        with pytest.raises(SpeedupError, match=r"differs from the masked model by .* align"):
            shrink(resnet, masks, X)

    def test_single_weights_take_out_nothing(self, resnet: nn.Module) -> None:
        masks = masks_of(resnet, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
        with pytest.raises(MaskError, match=r"no channel .* granularity='out_channel'"):
            shrink(resnet, masks, X)

    def test_a_model_that_counts_on_its_channels(self) -> None:
        class Fixed(ConvNet):
            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.conv1(x)).view(-1, 8, 64)
                return self.bn2(self.conv2(x.view(-1, 8, 8, 8)))

        model = Fixed()
        masks = masks_of(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5, "granularity": "out_channel"}])
        with pytest.raises(SpeedupError, match="ModelSpeedup fails on this model"):
            shrink(model, masks, X)

    def test_a_wrapped_model_is_refused(self, resnet: nn.Module) -> None:
        masks = LotteryJackpotPruner(resnet, self.config_list(resnet, with_norm=True)).get_masks()
        with pytest.raises(MaskError, match="still wrapped"):
            shrink(resnet, masks, X)


# --- sparse matrices


class Mixed(nn.Module):
    """Linear layers on sequences, 1x1 convolutions with and without stride and bias, and other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 64, 3, padding=1)
        self.point = nn.Conv2d(64, 64, 1, bias=False)
        self.strided = nn.Conv2d(64, 128, 1, stride=(2, 1), padding="valid")
        self.grouped = nn.Conv2d(128, 128, 1, groups=2)
        self.attention = nn.MultiheadAttention(128, 2, batch_first=True)
        self.up = nn.Linear(128, 64)
        self.head = nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(self.strided(F.relu(self.point(F.relu(self.wide(x)))))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head(F.gelu(self.up(x)))


@pytest.fixture
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


MATRICES = ["point", "strided", "up", "head"]
ALL = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.9}]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_csr_is_the_same(mixed: nn.Module, batch: int, layout: torch.memory_format) -> None:
    before = state(mixed)
    masks = masks_of(mixed, ALL)
    masks["attention.out_proj"] = {"weight": (torch.rand(128, 128) > 0.5).float()}
    sparse = sparse_csr(mixed, masks)
    for name in MATRICES:
        kept = int(masks[name]["weight"].sum())
        assert sum(x.numel() for x in sparse.get_submodule(name).buffers()) < 2 * kept + 300
    x = X[:batch].contiguous(memory_format=layout)
    close(sparse, masked(mixed, masks), x)
    with torch.inference_mode():
        sparse(x)
    close(copy.deepcopy(sparse), sparse, x)
    assert unchanged(mixed, before)


def test_csr_is_saved_and_loaded(mixed: nn.Module, tmp_path: Path) -> None:
    masks = masks_of(mixed, [{"op_names": MATRICES, "sparse_ratio": 0.9}])
    sparse = sparse_csr(mixed, masks)
    torch.save(sparse.state_dict(), tmp_path / "sparse.pth")
    for parameter in sparse.state_dict().values():
        parameter.zero_()
    sparse.load_state_dict(torch.load(tmp_path / "sparse.pth"))
    close(sparse, masked(mixed, masks), X)


def test_csr_without_a_matrix(model: nn.Module) -> None:
    with pytest.raises(MaskError, match="no linear layer and no 1x1 convolution"):
        sparse_csr(model, masks_of(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]))


def test_masks_of_another_model(mixed: nn.Module) -> None:
    with pytest.raises(MaskError, match=r"mask of up\.weight has shape \(3, 3\), expected \(64, 128\)"):
        sparse_csr(mixed, {"up": {"weight": torch.zeros(3, 3)}})


TWO_OF_FOUR = [{"op_names": MATRICES, "sparse_pattern": "2:4"}]


def test_two_of_four_is_what_the_kernels_take(mixed: nn.Module) -> None:
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    masks = masks_of(mixed, TWO_OF_FOUR)
    names = check_semi_structured(mixed, masks)
    assert names == ["point", "strided", "up"]  # the head has 10 outputs
    for name in names:
        weight = masked(mixed, masks).get_submodule(name).weight.detach().flatten(1).half()
        packed = sparse_semi_structured_from_dense_cutlass(weight)
        assert packed[0].numel() == weight.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)


def test_another_pattern_is_told(mixed: nn.Module) -> None:
    masks = masks_of(mixed, TWO_OF_FOUR)
    masks["up"]["weight"][3] = torch.tensor([1.0, 0, 0, 1]).repeat(32)
    assert check_semi_structured(mixed, masks)
    masks["up"]["weight"][3, 9] = 1
    with pytest.raises(MaskError, match=r"up\.weight .* keeps 3 of the inputs 8 to 11 of output 3;"):
        check_semi_structured(mixed, masks)
    with pytest.raises(MaskError, match="multiples of 32 outputs and of 64 inputs"):
        check_semi_structured(mixed, {"head": masks["head"]})


def test_two_of_four_needs_a_gpu(mixed: nn.Module) -> None:
    with pytest.raises(SpeedupError, match=r"point is on cpu, .* 8\.0 .* check_semi_structured"):
        semi_structured(mixed, masks_of(mixed, TWO_OF_FOUR))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_of_four_is_the_same(mixed: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> None:
    masks = masks_of(mixed, TWO_OF_FOUR)
    with pytest.raises(SpeedupError, match=r"float16 or bfloat16: call model\.half"):
        semi_structured(mixed.cuda(), masks)
    sparse = semi_structured(mixed.to(dtype), masks)
    x = X.to("cuda", dtype, memory_format=layout)
    with torch.no_grad():
        expected, found = masked(mixed, masks)(x), sparse(x)
    check_same([expected], [found], "2:4")
    assert isinstance(sparse.up.packed, torch.sparse.SparseSemiStructuredTensor)
    assert torch.equal(sparse.up.weight, masked(mixed, masks).up.weight)
    assert torch.equal(sparse.point.weight, masked(mixed, masks).point.weight)
    semi_structured(mixed, masks, x)


# --- comparison of outputs


def test_rounding_is_no_difference_and_nan_is() -> None:
    x = torch.tensor([1.0, -100.0])
    check_same([x], [x + 0.03], "it")
    for other in (x + 0.04, x * float("nan")):
        with pytest.raises(SpeedupError, match=r"it differs from the masked model by .* in output 0"):
            check_same([x], [other], "it")
    with pytest.raises(
        SpeedupError, match=r"it gives tensors of shapes \[\(1,\)\], the masked model \[\(2,\)\]"
    ):
        check_same([x], [x[:1]], "it")
    check_same([torch.tensor([], dtype=torch.int64)], [torch.tensor([], dtype=torch.int64)], "it")
    with pytest.raises(SpeedupError):
        check_same([torch.tensor([3])], [torch.tensor([4])], "it")


# --- NNI's pipeline


CONVS = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.7}]


def test_masks_go_by_file_and_by_ticket_to_other_pruners(model: nn.Module, tmp_path: Path) -> None:
    masks = masks_of(model, CONVS)
    save_masks(masks, tmp_path / "masks.pth")
    save_ticket(tmp_path / "jackpot.ticket", masks, model)
    for loaded in (load_masks(tmp_path / "masks.pth"), load_ticket(tmp_path / "jackpot.ticket").masks):
        random = LotteryJackpotPruner(copy.deepcopy(model), CONVS, init="random")
        for other in (LevelPruner(copy.deepcopy(model), CONVS), random):
            other.update_masks(loaded)
            assert torch.equal(other.get_masks()["conv2"]["weight"], masks["conv2"]["weight"])


@pytest.mark.parametrize("quantizer_class", [PtqQuantizer, QATQuantizer])
def test_masks_hold_under_a_quantizer_that_comes_after(
    model: nn.Module, batches: Batches, tmp_path: Path, quantizer_class: type
) -> None:
    evaluator = make_evaluator(model, batches)
    pruner = LotteryJackpotPruner(model, CONVS, evaluator, method=EdgePopup.paper(lr=1.0))
    save_masks(pruner.compress(6, None)[1], tmp_path / "masks.pth")
    pruner.unwrap_model()
    masks = load_masks(tmp_path / "masks.pth")

    held = LotteryJackpotPruner(model, CONVS, evaluator, init=masks, method=EdgePopup.paper(lr=0.0))
    quantized = {"target_names": ["weight", "_output_"], "quant_dtype": "int8", "quant_scheme": "symmetric"}
    quantizer = quantizer_class.from_compressor(held, [{"op_names": ["conv1", "conv2"], **quantized}])
    _, calibration = quantizer.compress(6, None)
    for name, mask in held.get_masks().items():
        assert torch.equal(mask["weight"], masks[name]["weight"])
        assert calibration[name]["weight"]["scale"].isfinite().all()

    seen: list[Tensor] = []
    forward = F.conv2d

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight)
        return forward(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "conv2d", spy)
        model.eval()(batches[0][0])
    for weight, name in zip(seen, ["conv1", "conv2"], strict=True):
        assert not weight[masks[name]["weight"] == 0].any()
        steps = weight / calibration[name]["weight"]["scale"]
        torch.testing.assert_close(steps, steps.round().clamp(-127, 127), rtol=0, atol=1e-3)
