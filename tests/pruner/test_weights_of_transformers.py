"""Weights outside of plain layers: Conv1D, the projections of attention, fused experts, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.of_transformers import GPT2, LLAMA, causal
from law import check_law
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, apply_masks, load_ticket, save_ticket
from nni_jackpot.modules.layouts import Layout, layout_of, matrices_of

transformers = pytest.importorskip("transformers")


def of_transformers(model: str, config: str, **options: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any] | tuple[Any, ...], Layout]] = {
    "GPT-2": (
        partial(of_transformers, "GPT2LMHeadModel", "GPT2Config", **GPT2),
        "Conv1D",
        causal(),
        Layout(1, 0),
    ),
    "Mixtral": (
        partial(of_transformers, "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **LLAMA),
        "MixtralExperts",
        causal(),
        Layout(1, 2, 0),
    ),
    "Qwen3-MoE": (
        partial(of_transformers, "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, **MOE),
        "Qwen3MoeExperts",
        causal(),
        Layout(1, 2, 0),
    ),
    "GPT-OSS": (
        partial(of_transformers, "GptOssForCausalLM", "GptOssConfig", num_local_experts=4, head_dim=8, **MOE),
        "GptOssExperts",
        causal(),
        Layout(2, 1, 0),
    ),
    "Llama 4": (
        partial(
            of_transformers,
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            num_local_experts=2,
            intermediate_size_mlp=32,
            head_dim=8,
            pad_token_id=0,
            **LLAMA,
        ),
        "Llama4TextExperts",
        causal(),
        Layout(2, 1, 0),
    ),
    "attention of PyTorch": (
        partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0, batch_first=True),
        "MultiheadAttention",
        (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)),),
        Layout(),
    ),
}


def weights_of(model: nn.Module, kind: str) -> dict[str, tuple[nn.Module, str]]:
    return {
        f"{prefix}.{name}": (module, name)
        for prefix, module in model.named_modules()
        if type(module).__name__ == kind
        for name in matrices_of(module) or ("weight",)
    }


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_weights(name: str) -> None:
    make, kind, inputs, _ = MODELS[name]
    exact = name != "attention of PyTorch"  # which runs a fused kernel without gradients
    check_law(make, [{"op_types": [kind], "sparse_ratio": 0.5}], inputs, exact=exact)


@pytest.mark.parametrize("name", MODELS)
def test_two_of_four_inputs_of_every_output(name: str, tmp_path: Path) -> None:
    make, kind, _, layout = MODELS[name]
    torch.manual_seed(0)
    model = make()
    weights = weights_of(model, kind)
    assert weights
    assert {layout_of(*weight) for weight in weights.values()} == {layout}
    pruner = LotteryJackpotPruner(model, [{"op_types": [kind], "sparse_pattern": "2:4"}])
    masks = flat(pruner.get_masks())
    assert masks.keys() == weights.keys()
    for mask in masks.values():
        rows = mask.movedim(layout.input_dim, -1).reshape(-1, 4)
        assert (rows.sum(1) == 2).all()
    save_ticket(tmp_path / "x.ticket", pruner, model)
    pruner.unwrap_model()
    ticket = load_ticket(tmp_path / "x.ticket")
    groups = {
        mask.group for targets in ticket.coded.values() for mask in targets.values() if mask and mask.group
    }
    assert groups == {(2, 4, layout.input_dim)}
    dense = {key: module._parameters[target].clone() for key, (module, target) in weights.items()}
    ticket.apply(model)
    for key, (module, target) in weights.items():
        assert torch.equal(module._parameters[target], dense[key] * masks[key])


@pytest.mark.parametrize("granularity", ["out_channel", "in_channel"])
@pytest.mark.parametrize("name", MODELS)
def test_channels_are_outputs_or_inputs_of_each_matrix(name: str, granularity: str) -> None:
    make, kind, inputs, layout = MODELS[name]
    entry = {"op_types": [kind], "sparse_ratio": 0.5, "granularity": granularity}
    torch.manual_seed(0)
    model = make()
    pruner = LotteryJackpotPruner(model, [entry])
    masks, wrapped = pruner.get_masks(), output(model, inputs)
    for key, mask in flat(masks).items():
        if mask.dim() < 2 or not key.endswith(("weight", "proj")):
            continue
        dim = layout.input_dim if granularity == "out_channel" else layout.output_dim
        assert (mask.sum(dim) % mask.shape[dim] == 0).all(), key  # whole channels
        kept = mask.amax(dim)
        assert int(kept.sum()) == kept.numel() - kept.numel() // 2
    pruner.unwrap_model()
    assert torch.allclose(output(apply_masks(model, masks), inputs), wrapped, atol=1e-5)


@torch.no_grad()
def output(model: nn.Module, inputs: Any) -> Tensor:
    found = model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(*inputs)
    return getattr(found, "logits", found)


def flat(masks: Any) -> dict[str, Tensor]:
    return {
        f"{module}.{target}": mask
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None and not mask.all()
    }


def warned(caplog: pytest.LogCaptureFixture, make: Callable[[], nn.Module], **entry: Any) -> str:
    caplog.clear()
    torch.manual_seed(0)
    model = make()
    LotteryJackpotPruner(model, [{"sparse_ratio": 0.5, **entry}]).unwrap_model()
    return "\n".join(record.getMessage() for record in caplog.records)


def test_weights_that_no_type_names_are_said(caplog: pytest.LogCaptureFixture) -> None:
    make = MODELS["Mixtral"][0]
    parameters = dict(make().named_parameters())
    left = [parameter for name, parameter in parameters.items() if ".experts." in name]
    share = sum(map(Tensor.numel, left)) / sum(map(Tensor.numel, parameters.values()))
    message = warned(caplog, make, op_types=["Linear", "Embedding"])
    assert f"{share:.0%} of all weights stay whole" in message
    assert "MixtralExperts, model.layers.0.mlp.experts.gate_up_proj, " in message
    assert ": name it by op_types" in message
    assert "MixtralExperts" not in warned(caplog, make, op_types=["Linear", "MixtralExperts"])
    assert not warned(caplog, make, op_types=["Linear"], exclude_op_types=["MixtralExperts"])
    assert not warned(caplog, make, op_names=["lm_head"])
    attention = warned(caplog, MODELS["attention of PyTorch"][0], op_types=["Linear"])
    assert "MultiheadAttention, self_attn.in_proj_weight" in attention
    assert "NonDynamicallyQuantizableLinear, self_attn.out_proj.weight" in attention
    assert "Conv1D, transformer.h.0" in warned(caplog, MODELS["GPT-2"][0], op_types=["Linear"])


def test_experts_whose_inputs_are_not_known_are_said_and_not_guessed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

    assert matrices_of(Experts()) == ()
    message = warned(caplog, lambda: nn.Sequential(nn.Linear(8, 8), Experts()), op_types=["Linear"])
    assert "64% of all weights stay whole" in message  # 128 of 200
    assert "Experts, 1.up_proj: NNI does not know it" in message
    experts = Experts()
    experts.is_transposed = True
    assert matrices_of(experts) == ("up_proj",)
    assert layout_of(experts, "up_proj") == Layout(2, 1, 0)
