"""Networks of transformers: text, images and speech."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from law import Inputs
from torch import nn

from architectures.architecture import IMAGE_LAYERS, Architecture, images

TEXT_LAYERS = ("Linear", "Embedding")
SMALL: Mapping[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def text(**more: Any) -> Inputs:
    """Return two sequences, one of which is padded."""
    tokens = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, **more}


def decoded(tokens: str = "decoder_input_ids") -> Inputs:
    return text(use_cache=False, **{tokens: torch.arange(3, 13).view(2, 5)})


def of_transformers(
    model: str,
    config: str,
    inputs: Callable[[], Inputs] = text,
    op_types: tuple[str, ...] = TEXT_LAYERS,
    registered: tuple[str, ...] = (),
    **options: Any,
) -> Architecture:
    def make() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Architecture(make, inputs, op_types, registered)


causal = partial(text, use_cache=False)
GPT2: Mapping[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 67,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
}
T5: Mapping[str, Any] = {
    "vocab_size": 67,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
}
LLAMA: Mapping[str, Any] = {**SMALL, "num_key_value_heads": 1}


def sound() -> Inputs:
    return {"input_values": images(400)[0]}


def spectrogram() -> Inputs:
    return {
        "input_features": images(8, 16)[0],
        "decoder_input_ids": torch.arange(3, 13).view(2, 5),
        "use_cache": False,
    }


TRANSFORMERS: dict[str, Architecture] = {
    "BERT": of_transformers("BertModel", "BertConfig", **SMALL),
    "BERT, masked words by a tied decoder": of_transformers("BertForMaskedLM", "BertConfig", **SMALL),
    "GPT-2": of_transformers("GPT2LMHeadModel", "GPT2Config", causal, ("Conv1D", *TEXT_LAYERS), **GPT2),
    "Llama": of_transformers("LlamaForCausalLM", "LlamaConfig", causal, **LLAMA),
    "Llama, tied": of_transformers(
        "LlamaForCausalLM", "LlamaConfig", causal, tie_word_embeddings=True, **LLAMA
    ),
    "Mixtral": of_transformers("MixtralForCausalLM", "MixtralConfig", causal, num_local_experts=4, **LLAMA),
    "Mixtral, its fused experts": of_transformers(
        "MixtralForCausalLM",
        "MixtralConfig",
        causal,
        ("MixtralExperts", *TEXT_LAYERS),
        num_local_experts=4,
        **LLAMA,
    ),
    "GPT-OSS, its fused experts": of_transformers(
        "GptOssForCausalLM",
        "GptOssConfig",
        causal,
        ("GptOssExperts", *TEXT_LAYERS),
        num_local_experts=4,
        head_dim=8,
        **LLAMA,
    ),
    "T5": of_transformers("T5ForConditionalGeneration", "T5Config", decoded, **T5),
    "ViT": of_transformers(
        "ViTForImageClassification",
        "ViTConfig",
        lambda: {"pixel_values": images(3, 32, 32)[0]},
        IMAGE_LAYERS,
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "Whisper": of_transformers(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        spectrogram,
        ("Conv1d", *TEXT_LAYERS),
        vocab_size=67,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "wav2vec 2.0, its positions by a convolution with weight norm": of_transformers(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        sound,
        ("Conv1d", "Linear"),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    ),
}
