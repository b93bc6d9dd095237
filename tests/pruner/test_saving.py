"""Transformers, safetensors and PyTorch save and load a wrapped model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from conftest import ConvNet
from nni.compression.utils import TransformersEvaluator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, apply_masks
from nni_jackpot.errors import MaskError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=50, num_labels=2, max_position_embeddings=16, **SIZES)
    )


def masked_lm() -> nn.Module:
    """Return a model whose output layer is its embedding."""
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=50, tie_word_embeddings=True, num_key_value_heads=2, **SIZES)
    )


def rows(n: int, is_lm: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 50, (8,), generator=generator) for _ in range(n)]
    return [{"input_ids": t, "labels": t if is_lm else torch.tensor(i % 2)} for i, t in enumerate(tokens)]


def pruner_of(make: Any, folder: Path, **arguments: Any) -> LotteryJackpotPruner:
    torch.manual_seed(0)
    model = make()
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True, **arguments
    )
    data = rows(24, make is not classifier)
    trainer = nni.trace(transformers.Trainer)(model, settings, train_dataset=data, eval_dataset=data[:8])
    return LotteryJackpotPruner(model, LINEAR, TransformersEvaluator(trainer))


@pytest.mark.honours("TransformersEvaluator")
@pytest.mark.parametrize("make", [classifier, masked_lm, llama])
def test_a_trainer_saves_as_it_does_by_default(make: Any, tmp_path: Path) -> None:
    plain = pruner_of(make, tmp_path / "plain", save_strategy="no").compress(None, 2)[1]
    pruner = pruner_of(make, tmp_path / "saved", save_strategy="steps", save_steps=2)
    masks = pruner.compress(None, 2)[1]
    assert all(torch.equal(masks[name]["weight"], plain[name]["weight"]) for name in plain)
    (file,) = (tmp_path / "saved" / "checkpoint-6").glob("*.safetensors")
    saved = load_file(file)
    assert any(name.endswith("weight_mask") for name in saved)
    assert any(name.endswith("weight_score") for name in saved)


@pytest.mark.parametrize("make", [classifier, masked_lm])
def test_the_best_model_is_loaded_with_its_masks(make: Any, tmp_path: Path) -> None:
    pruner = pruner_of(
        make,
        tmp_path,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    model, masks = pruner.compress(None, 3)
    best = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved = load_file(Path(best, "model.safetensors"))
    scores = {name: p for name, p in model.named_parameters() if name.endswith("weight_score")}
    assert scores
    assert all(torch.equal(score, saved[name]) for name, score in scores.items())
    tokens = rows(4, True)[0]["input_ids"].view(1, -1)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    pruner.unwrap_model()
    torch.manual_seed(0)
    copy = apply_masks(make(), masks).eval()
    with torch.no_grad():
        assert torch.equal(found, copy(input_ids=tokens).logits)
    for targets in masks.values():  # also if the best was found before all zeros were there
        assert int((targets["weight"] == 0).sum()) == int(0.5 * targets["weight"].numel())


@pytest.mark.parametrize(
    "config",
    [
        {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"},
        {"op_names": ["conv1", "bn1"], "sparse_ratio": 0.5, "granularity": "out_channel",
         "dependency_group_id": 0},
    ],
    ids=["weights", "channels", "one score for two"],
)  # fmt: skip
def test_a_state_dict_has_no_tensor_twice(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    pruner = LotteryJackpotPruner(model, [config])
    save_file(model.state_dict(), tmp_path / "wrapped.safetensors")
    torch.manual_seed(1)
    other = ConvNet()
    other_pruner = LotteryJackpotPruner(other, [config], init="random")
    other.load_state_dict(load_file(tmp_path / "wrapped.safetensors"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    ours, theirs = pruner.get_masks(), other_pruner.get_masks()
    assert all(torch.equal(ours[name]["weight"], theirs[name]["weight"]) for name in ours)


TOKENS = torch.arange(1, 17).view(2, 8)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("types", [["Linear"], ["Embedding"], ["Linear", "Embedding"]])
@pytest.mark.parametrize("make", [classifier, masked_lm, llama])
def test_what_is_saved_while_wrapped_is_the_dense_model(make: Any, types: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    dense = logits(model)
    pruner = LotteryJackpotPruner(model, [{"op_types": types, "sparse_ratio": 0.5}])
    model.save_pretrained(tmp_path / "wrapped")
    loaded, report = type(model).from_pretrained(tmp_path / "wrapped", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(logits(loaded), dense)
    pruner.unwrap_model()
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("types", [["Linear"], ["Embedding"], ["Linear", "Embedding"]])
@pytest.mark.parametrize("make", [classifier, masked_lm, llama])
def test_what_is_saved_with_masks_applied_is_the_sparse_model(
    make: Any, types: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    pruner = LotteryJackpotPruner(model, [{"op_types": types, "sparse_ratio": 0.5}])
    sparse, masks = logits(model), pruner.get_masks()
    pruner.unwrap_model()
    apply_masks(model, masks).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), sparse)
    for name, targets in masks.items():
        assert not loaded.get_submodule(name).weight[targets["weight"] == 0].any()


def test_a_save_that_takes_no_state_dict_is_refused_while_wrapped(tmp_path: Path) -> None:
    class Other(ConvNet):
        def save_pretrained(self, folder: Path) -> None:
            torch.save(self.state_dict(), folder / "weights")

    model = Other()
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(MaskError, match=r"Other cannot be saved .*unwrap_model"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pruner.unwrap_model()
    model.save_pretrained(tmp_path)
