"""A ticket changes only masked weights and norm statistics of its base, completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_tickets import Forged, good, model, statistics
from torch import Tensor, nn

from nni_jackpot import TicketBox, load_sparse, load_ticket, save_sparse, save_ticket
from nni_jackpot.errors import MaskError, OtherBaseError, TicketError
from nni_jackpot.storage.formats.sealed import read_sealed
from nni_jackpot.storage.norm_statistics import statistics_of
from nni_jackpot.storage.ticket import KIND


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.ticket"


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)) for n in a
    )


def as_statistic(forged: Forged, name: str, value: Tensor) -> None:
    """Move a tensor from the base to the statistics, with another value."""
    forged.take_from_base(name)
    module, _, target = name.rpartition(".")
    forged.content["masks"].get(module, {}).pop(target, None)
    forged.tensors.pop(f"mask.{name}", None)
    forged.set_statistics(statistics() | {name: value})


def refused_and_untouched(path: Path, base: Any, error: type[Exception], words: str) -> None:
    """Check that a model, its state dict and a box refuse a ticket, and that nothing changes."""
    state = base.state_dict()
    before = copy_of(state)
    for apply in (
        lambda: load_ticket(path).apply(base),
        lambda: load_ticket(path).apply(state),
        lambda: TicketBox(base).add("forged", load_ticket(path)),
    ):
        with pytest.raises(error, match=words):
            apply()
        assert equal(state, before)


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias", "conv1.weight", "bn1.weight"])
def test_a_weight_that_is_said_to_be_a_statistic_is_not_replaced(
    path: Path, tmp_path: Path, name: str
) -> None:
    forged, base = good(tmp_path), model()
    as_statistic(forged, name, torch.full_like(base.state_dict()[name], 9))
    path.write_bytes(forged.sealed())
    refused_and_untouched(path, base, TicketError, f"the statistic {name}, .*: a statistic is called")


class Odd(nn.Module):
    """Weights with names of norm statistics."""

    def __init__(self, weights: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
        for name, buffer in (buffers or {}).items():
            self.register_buffer(name, buffer)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (Odd({"running_mean": torch.rand(4)}), "running_mean"),
        (Odd({"running_var": torch.rand(4)}, {"running_mean": torch.rand(3)}), "running_var"),
        (Odd({"running_mean": torch.rand(4)}, {"weight": torch.rand(3, 4)}), "running_mean"),
        (Odd({"num_batches_tracked": torch.tensor(7)}), "num_batches_tracked"),
    ],
)
def test_weights_with_the_name_of_a_statistic_are_part_of_the_base(
    path: Path, tmp_path: Path, base: nn.Module, name: str
) -> None:
    masks = {"fc": {"weight": torch.eye(2, 4)}}
    for state in (base, base.state_dict()):
        save_ticket(tmp_path / "good", masks, state)
        assert name in load_ticket(tmp_path / "good").base
    forged = Forged(*read_sealed(tmp_path / "good", KIND, 1))
    forged.take_from_base(name)
    forged.set_statistics({name: torch.full_like(base.state_dict()[name], 9)})
    path.write_bytes(forged.sealed())
    refused_and_untouched(path, base, OtherBaseError, f"{name} is not a norm statistic")


def test_a_model_tells_parameters_from_statistics_where_a_state_dict_cannot(
    path: Path, tmp_path: Path
) -> None:
    base = Odd({"running_mean": torch.rand(4), "running_var": torch.rand(4)})
    save_ticket(path, {"fc": {"weight": torch.eye(2, 4)}}, base)
    assert not load_ticket(path).statistics
    load_ticket(path).apply(base.state_dict())
    forged = Forged(*read_sealed(path, KIND, 1))
    forged.take_from_base("running_mean")
    forged.set_statistics({"running_mean": torch.zeros(4)})
    path.write_bytes(forged.sealed())
    before = copy_of(base.state_dict())
    for apply in (load_ticket(path).apply, lambda base: TicketBox(base).add("forged", load_ticket(path))):
        with pytest.raises(OtherBaseError, match="running_mean is not a norm statistic"):
            apply(base)
    assert equal(base.state_dict(), before)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.BatchNorm2d(4), ["running_mean", "running_var", "num_batches_tracked"]),
        (nn.BatchNorm1d(4, affine=False), ["running_mean", "running_var", "num_batches_tracked"]),
        (
            nn.InstanceNorm2d(4, track_running_stats=True),
            ["running_mean", "running_var", "num_batches_tracked"],
        ),
        (nn.BatchNorm2d(4, track_running_stats=False), []),
        (nn.LayerNorm(4), []),
        (
            Odd({"weight": torch.rand(4)}, {"running_var": torch.ones(4)}),
            ["running_var"],
        ),  # as EvoNorm has it
        (Odd({}, {"running_mean": torch.ones(1, 4, 1, 1), "running_var": torch.ones(1, 4, 1, 1)}), []),
    ],
)
def test_statistics_are_those_of_norm_layers(layer: nn.Module, names: list[str]) -> None:
    within = nn.ModuleDict({"norm": layer}).state_dict()
    assert statistics_of(within) == [f"norm.{name}" for name in names]
    assert statistics_of(layer.state_dict()) == names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_no_layer_has_are_not_saved(path: Path, value: float) -> None:
    base = model()
    base.bn2.running_var[3] = value
    with pytest.raises(TicketError, match=r"bn2\.running_var: statistics are finite"):
        save_ticket(path, {"fc": {"weight": torch.eye(3, 12)}}, base)
    assert not path.exists()


def test_two_masks_of_one_name_are_neither_saved_nor_applied(path: Path, tmp_path: Path) -> None:
    mask, base = torch.eye(3, 12), model()
    masks = {"": {"fc.weight": mask}, "fc": {"weight": 1 - mask}}
    for save in (lambda: save_ticket(path, masks, base), lambda: save_sparse(path, base, masks)):
        with pytest.raises(MaskError, match=r"two masks of fc\.weight"):
            save()
    assert not path.exists()
    forged = good(tmp_path)
    forged.set_statistics({name: torch.ones_like(value) for name, value in statistics().items()})
    described = {"dtype": "bool", "shape": [3, 12], "ones": 0}
    forged.content["masks"][""] = {"fc.weight": described}
    path.write_bytes(forged.sealed())
    refused_and_untouched(path, base, TicketError, r"two masks of fc\.weight")


def test_a_statistic_in_the_memory_of_a_weight_is_refused(path: Path) -> None:
    base = model()
    with torch.no_grad():
        base.bn1.weight.copy_(base.bn1.running_mean)
    save_ticket(path, {"fc": {"weight": torch.eye(3, 12)}}, base)
    base.bn1.running_mean.fill_(9)
    state = base.state_dict()
    state["bn1.running_mean"] = state["bn1.weight"]
    before = copy_of(state)
    with pytest.raises(MaskError, match=r"statistic bn1\.running_mean shares memory with bn1\.weight"):
        load_ticket(path).apply(state)
    assert equal(state, before)
    state["bn1.running_mean"] = state["bn1.weight"].clone()
    load_ticket(path).apply(state)


def test_masks_of_one_tensor_must_be_equal(path: Path) -> None:
    untied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    untied[1].load_state_dict(untied[0].state_dict())
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    tied.load_state_dict(untied.state_dict())
    first, other = torch.eye(6), torch.eye(6).flip(0)
    save_ticket(path, {"0": {"weight": first}, "1": {"weight": other}}, untied)
    words = "0.weight and 1.weight are one tensor, and their masks differ"
    refused_and_untouched(path, tied, MaskError, words)
    for save in (save_ticket, lambda path, masks, model: save_sparse(path, model, masks)):
        with pytest.raises(MaskError, match=words):
            save(path, {"0": {"weight": first}, "1": {"weight": other}}, tied)
    save_ticket(path, {"0": {"weight": first.bool()}, "1": {"weight": first}}, tied)
    load_ticket(path).apply(tied)
    assert torch.equal(tied[0].weight != 0, first.bool())
    assert tied[0].weight is tied[1].weight


def test_parts_of_one_memory_are_tensors_of_their_own(path: Path, tmp_path: Path) -> None:
    good(tmp_path)
    base = model().state_dict()
    flat = torch.cat([t.reshape(-1) for t in base.values() if t.is_floating_point()])
    at = 0
    for name, tensor in base.items():
        if tensor.is_floating_point():
            base[name] = flat[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
    expected = copy_of(model().state_dict())
    for state in (base, expected):
        load_ticket(tmp_path / "good.ticket").apply(state)
    assert equal(base, expected)


def expanded(weight: Tensor) -> Tensor:
    return weight[:1].expand_as(weight)


def inferred(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        return weight.clone()


@pytest.mark.parametrize("change", [expanded, inferred])
def test_a_base_that_cannot_be_written_is_left_as_it_is(path: Path, change: Any) -> None:
    base = model()
    with torch.no_grad():
        base.fc.weight[:] = base.fc.weight[:1]
    save_ticket(
        path, {"conv1": {"weight": torch.zeros(8, 1, 3, 3)}, "fc": {"weight": torch.eye(3, 12)}}, base
    )
    base.bn1.running_mean.fill_(5)
    state = base.state_dict()
    state["fc.weight"] = change(state["fc.weight"])
    before = copy_of(state)
    with pytest.raises(MaskError, match=r"fc\.weight cannot be written in place"):
        load_ticket(path).apply(state)
    assert equal(state, before)


@pytest.mark.parametrize("change", [lambda w: w.to_sparse(), lambda w: w.to("meta")])
def test_tensors_without_plain_values_are_no_base(path: Path, tmp_path: Path, change: Any) -> None:
    good(tmp_path)
    state = model().state_dict()
    state["fc.weight"] = change(state["fc.weight"])
    masks = {"conv1": {"weight": torch.zeros(8, 1, 3, 3)}}
    for use in (
        lambda: load_ticket(tmp_path / "good.ticket").apply(state),
        lambda: save_ticket(path, masks, state),
        lambda: save_sparse(path, state, masks),
    ):
        with pytest.raises(MaskError, match=r"fc\.weight has no plain values"):
            use()
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fnuz, torch.complex128])
def test_a_base_of_types_that_no_mask_has_is_read_as_it_is_written(path: Path, dtype: torch.dtype) -> None:
    base = nn.Linear(4, 4)
    base.register_buffer("rare", torch.ones(2).to(dtype))
    base.register_buffer("running_mean", torch.ones(2).to(dtype))
    save_ticket(path, {"": {"weight": torch.eye(4)}}, base)
    load_ticket(path).apply(base)
    base.rare = torch.zeros(2).to(dtype)
    with pytest.raises(OtherBaseError, match=r"rare .* differs"):
        load_ticket(path).apply(base)


def test_sparse_checkpoints_of_types_that_no_file_has(path: Path) -> None:
    base = nn.Linear(4, 4)
    base.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TicketError, match=r"no sparse checkpoint can hold whole\.wide, of type complex128"):
        save_sparse(path, base, {"": {"weight": torch.eye(4)}})
    base.wide = torch.ones(2, dtype=torch.uint16)
    save_sparse(path, base, {"": {"weight": torch.eye(4)}})
    assert load_sparse(path)["wide"].dtype == torch.uint16


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"curve": list(range(50_000))}, "no more than 32,768 values"),
        ({"log": "x" * 600_000}, "no more than 512 KiB"),
        ({"big": 10**50}, "no more than 40 characters"),
        ({1: 1, "1": 2}, "a key occurs twice"),
    ],
)
def test_metadata_that_no_reader_takes_are_not_saved(path: Path, metadata: dict, words: str) -> None:
    with pytest.raises(TicketError, match=words):
        save_ticket(path, {"fc": {"weight": torch.eye(3, 12)}}, model(), metadata)
    assert not path.exists()


def test_deep_metadata_are_not_saved(path: Path) -> None:
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(TicketError, match="at most 64 levels deep"):
        save_ticket(path, {"fc": {"weight": torch.eye(3, 12)}}, model(), {"deep": deep})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "a\0b", "x" * 5000):
        for load in (load_ticket, load_sparse):
            with pytest.raises(TicketError, match="is not a "):
                load(path)


def test_names_that_a_terminal_would_act_on_are_kept_and_shown_escaped(path: Path) -> None:
    base = nn.Sequential()
    for name in ("a\x1b[31m", "b\nc", "d\0", "\u202e", "ü", "\x9b2J"):
        base.add_module(name, nn.Linear(2, 2))
    masks = {name: {"weight": torch.eye(2)} for name, _ in base.named_children()}
    save_ticket(path, masks, base)
    ticket = load_ticket(path)
    assert list(ticket.masks) == list(masks)
    state = base.state_dict()
    with pytest.raises(OtherBaseError) as raised:
        ticket.apply({name: tensor + 1 for name, tensor in state.items()})
    assert str(raised.value).isprintable()
    assert r"a\x1b[31m.weight" in str(raised.value)
    with pytest.raises(MaskError) as missing:
        save_ticket(path, {"e\x1b[31m": {"weight": torch.eye(2)}}, base)
    assert str(missing.value).isprintable()
    ticket.apply(state)
    assert all(torch.equal(state[f"{name}.weight"] != 0, torch.eye(2).bool()) for name in masks)


def test_a_box_with_a_forged_ticket_among_others(path: Path, tmp_path: Path) -> None:
    forged, base = good(tmp_path), model()
    box = TicketBox(base)
    box.add("good", load_ticket(tmp_path / "good.ticket"))
    as_statistic(forged, "fc.bias", torch.ones(3))
    path.write_bytes(forged.sealed())
    with pytest.raises(TicketError):
        box.add("forged", load_ticket(path))
    box.use("good")
    box.use(None)
    assert box.names == ["good"]
    assert equal(base.state_dict(), model().state_dict())
