"""Networks of transformers with random weights and a tokenizer of words, and text; not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["<unk>", "<pad>", "<mask>"]
_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def save_network(folder: Path, kind: str = "LlamaForCausalLM", **options: Any) -> Path:
    """Save a network with its tokenizer to a folder, as safetensors."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    torch.manual_seed(0)
    config = getattr(transformers, "LlamaConfig" if kind.startswith("Llama") else "BertConfig")
    network = getattr(transformers, kind)(config(**_SIZES, initializer_range=0.5))
    network.save_pretrained(folder, **options)
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_text(path: Path, paragraphs: int = 60) -> Path:
    """Write paragraphs of words to a file."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(paragraphs):
        numbers = torch.randint(len(WORDS), (30,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in numbers))
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def write_run(root: Path, network: Path, **changes: Any) -> Path:
    """Write the YAML file of a run on text; ``changes`` replace values of sections."""
    content: dict[str, Any] = {
        "output": str(root / "out"),
        "device": "cpu",
        "data": {
            "name": "text",
            "root": str(root / "text.txt"),
            "tokens": 16,
            "sequences": 24,
            "test_sequences": 6,
        },
        "model": {"name": f"transformers/{network}"},
        "pretrain": {"epochs": 0, "lr": 0.1, "cache": str(root / "cache")},
        "config_list": [
            {"op_types": ["Linear"], "exclude_op_names_re": [".*(lm_head|pooler|cls|classifier).*"]}
            | {"sparse_pattern": "2:4"}
        ],
        "search": {"epochs": 0, "loss": "kl", "blockwise": {"steps": 4}},
        "finetune": {"epochs": 0, "lr": 0.05},
        "comparators": {"sparsegpt": {}},
    }
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and value else value
    path = root / "run.yml"
    path.write_text(yaml.safe_dump(content))
    return path
