"""Affines of norm layers and biases that a search trains along."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_runs import command, write_file
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot import LotteryJackpotPruner, TicketBox, apply_masks, load_ticket, save_ticket
from nni_jackpot.cli import command_line as cli
from nni_jackpot.errors import MaskError, SearchDivergedError
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.folder.pretrained import cache_path
from nni_jackpot.experiment.models.checkpoints import read_checkpoint

CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16) if kind == "batch norm" else nn.LayerNorm(16)
    return nn.Sequential(nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(12)
    ]


def search(model: nn.Module, stop: int = 12, **options: object) -> tuple[LotteryJackpotPruner, object]:
    pruner = LotteryJackpotPruner(model, CONFIG, norm="tune", **options)
    loop = pruner.begin(total_steps=12)
    for x, y in batches()[:stop]:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        loop.step(loss)
    return pruner, loop


TUNED = {"0.bias", "1.weight", "1.bias", "3.bias"}


@pytest.mark.parametrize("kind", ["batch norm", "layer norm"])
def test_only_tuned_parameters_change(kind: str) -> None:
    model = network(kind)
    dense, objects = copy.deepcopy(model), dict(model.named_parameters())
    model[0].weight.requires_grad_(False)
    pruner, loop = search(model)
    masks = loop.finish()
    x = torch.randn(5, 6)
    live = model.eval()(x)
    pruner.unwrap_model()
    assert set(pruner.tuned) == TUNED
    now = dict(model.named_parameters())
    assert {name for name, p in now.items() if not torch.equal(p, dense.get_parameter(name))} == TUNED
    assert all(now[name] is p for name, p in objects.items())
    assert {name for name, p in now.items() if p.requires_grad} == set(now) - {"0.weight"}
    assert all(p.grad is None for p in now.values())
    assert torch.equal(apply_masks(copy.deepcopy(model), masks).eval()(x), live)


def test_values_and_masks_of_the_best_moment_belong_together() -> None:
    model = network("layer norm")
    start = copy.deepcopy(model)
    pruner = LotteryJackpotPruner(model, CONFIG, norm="tune")
    first = pruner.get_masks()
    losses = iter([1.0, 0.0])  # of the last masks, and of those of the start
    loop = pruner.begin(total_steps=2, held_out=lambda: next(losses))
    for x, y in batches()[:2]:
        F.cross_entropy(model(x), y).backward()
        loop.step()
    masks = loop.finish()
    pruner.unwrap_model()
    assert all(torch.equal(p, start.get_parameter(name)) for name, p in model.named_parameters())
    assert all(torch.equal(masks[m]["weight"], first[m]["weight"]) for m in masks)


def test_a_divergence_returns_to_the_values_of_the_last_finite_loss() -> None:
    model, before = network("layer norm"), network("layer norm")
    _, loop = search(model, stop=4)
    search(before, stop=3)
    x, y = batches()[4]
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(SearchDivergedError):
        loop.step(torch.tensor(float("nan")))
    now, expected = (dict(one.named_parameters()) for one in (model, before))
    tuned = [name for name in now if name.endswith("bias")]
    assert tuned
    assert all(torch.equal(now[name], expected[name]) for name in tuned)


def test_a_search_continues_bit_for_bit() -> None:
    whole = network("layer norm")
    _, loop = search(whole)
    expected = loop.finish()
    model = network("layer norm")
    _, loop = search(model, stop=5)
    state, values = copy.deepcopy(loop.state_dict()), copy.deepcopy(model.state_dict())
    other = network("layer norm")
    pruner = LotteryJackpotPruner(other, CONFIG, norm="tune")
    resumed = pruner.begin(total_steps=12)
    other.load_state_dict(values)
    resumed.load_state_dict(state)
    for x, y in batches()[5:]:
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        resumed.step(loss)
    masks = resumed.finish()
    assert all(torch.equal(masks[m]["weight"], expected[m]["weight"]) for m in masks)
    theirs = dict(whole.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in other.named_parameters())


def test_a_ticket_has_the_tuned_values(tmp_path: Path) -> None:
    base = network("batch norm")
    model = copy.deepcopy(base)
    pruner, loop = search(model)
    masks = loop.finish()
    save_ticket(tmp_path / "a.ticket", pruner, model)
    pruner.unwrap_model()
    sparse = apply_masks(copy.deepcopy(model), masks).state_dict()
    save_ticket(tmp_path / "b.ticket", masks, model, tuned=pruner.tuned)
    for name in ("a.ticket", "b.ticket"):
        ticket = load_ticket(tmp_path / name)
        assert ticket.tuned.keys() == TUNED
        found = copy.deepcopy(base)
        ticket.apply(found)
        assert all(torch.equal(value, sparse[key]) for key, value in found.state_dict().items())
    deployed = copy.deepcopy(base)
    box = TicketBox(deployed)
    box.add("a", ticket)
    box.use("a")
    assert torch.equal(deployed[1].bias, sparse["1.bias"])
    box.use(None)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in deployed.state_dict().items())


def test_a_ticket_of_channels_masks_tuned_values(tmp_path: Path) -> None:
    base = network("batch norm")
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "out_channel"}]
    model = copy.deepcopy(base)
    pruner = LotteryJackpotPruner(model, config, norm="tune")
    loop = pruner.begin(total_steps=4)
    for x, y in batches()[:4]:
        F.cross_entropy(model(x), y).backward()
        loop.step()
    masks = loop.finish()
    pruner.unwrap_model()
    assert int(masks["0"]["bias"].sum()) == 8
    save_ticket(tmp_path / "a.ticket", masks, model, tuned=pruner.tuned)
    found = copy.deepcopy(base)
    load_ticket(tmp_path / "a.ticket").apply(found)
    expected = apply_masks(model, masks).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "none.bias"])
def test_only_affines_and_biases_are_tuned_values(name: str, tmp_path: Path) -> None:
    model = network("batch norm")
    masks = {"0": {"weight": (torch.rand(16, 6) < 0.5).float()}}
    with pytest.raises(MaskError, match="neither an affine of a norm layer nor a bias"):
        save_ticket(tmp_path / "a.ticket", masks, model, tuned=[name])
    assert not any(tmp_path.iterdir())


def test_a_run_from_yaml_and_its_ticket(tmp_path: Path) -> None:
    file = write_file(tmp_path, search={"norm": "tune"})
    assert command("search", file) == 0
    run = tmp_path / "out"
    assert cli.main(["export", str(run)]) == 0
    ticket = load_ticket(run / "jackpot.ticket")
    assert ticket.tuned
    config = load_config(run / "config.yml", is_stored=True)
    base = read_checkpoint(cache_path(config), ticket.names)
    changed = [name for name, value in ticket.tuned.items() if not torch.equal(value, base[name])]
    assert changed
    ticket.apply(base)
    found = read_checkpoint(run / "jackpot.pth", ticket.names)
    assert all(torch.equal(value, found[name]) for name, value in base.items())
