"""What a ticket takes: the entropy of its masks, and little for names and hashes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_jackpot import LotteryJackpotPruner, load_ticket, save_ticket
from nni_jackpot.errors import TicketError
from nni_jackpot.storage.formats.sealed import read_parts
from nni_jackpot.storage.ticket import KIND


def two_of_four(model: nn.Module, path: Path) -> int:
    """Save a 2:4 ticket, and return the number of weights."""
    pruner = LotteryJackpotPruner(model, [{"op_types": ["Linear"], "sparse_pattern": "2:4"}])
    save_ticket(path, pruner, model)
    pruner.unwrap_model()
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def test_two_of_four_takes_the_logarithm_of_six(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = two_of_four(nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 2048)), tmp_path / "a")
    assert (tmp_path / "a").stat().st_size <= 1.005 * weights * math.log2(6) / 4 / 8


def test_the_names_of_many_layers_are_deflated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"gate_proj": nn.Linear(16, 16, bias=False)}) for _ in range(250)]
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})
    two_of_four(model, tmp_path / "a")
    ticket = load_ticket(tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    assert size - sum(ticket.nbytes.values()) < 150 * len(blocks)
    names = [name for name, _ in model.named_parameters()]
    assert ticket.names == names
    with pytest.raises(TicketError, match="of version 2, and this nni_jackpot reads up to 1"):
        read_parts(tmp_path / "a", KIND, 1)
    ticket.apply(model)
    assert all(int((p == 0).sum()) == p.numel() // 2 for p in model.parameters())
