from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIG_LIST, ConvNet
from torch import Tensor, nn

from nni_jackpot import LotteryJackpotPruner, Ticket, TicketBox, load_ticket, save_ticket
from nni_jackpot.errors import MaskError, OtherBaseError, TicketError


@pytest.fixture
def tickets(tmp_path: Path) -> dict[str, Ticket]:
    """Tickets of one base, of different targets, statistics and sparsity."""
    tickets = {}
    for i, (name, modules) in enumerate({"a": ["conv1", "conv2"], "b": ["conv2"], "c": ["fc"]}.items()):
        torch.manual_seed(0)
        model = ConvNet()
        torch.manual_seed(i)
        masks = {m: {"weight": torch.rand_like(getattr(model, m).weight) < 0.3} for m in modules}
        model.bn1.running_mean.normal_()
        save_ticket(tmp_path / name, masks, model)
        tickets[name] = load_ticket(tmp_path / name)
    return tickets


@pytest.fixture
def box(model: nn.Module, tickets: dict[str, Ticket]) -> TicketBox:
    box = TicketBox(model)
    for name, ticket in tickets.items():
        box.add(name, ticket)
    return box


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(-1).view(torch.uint8), b[n].view(-1).view(torch.uint8)) for n in a
    )


def test_tickets_come_and_go_without_a_trace(box: TicketBox, tickets: dict[str, Ticket]) -> None:
    base = copy_of(box.model)
    expected: dict[str | None, dict[str, Tensor]] = {None: base}
    for name, ticket in tickets.items():
        expected[name] = {key: tensor.clone() for key, tensor in base.items()}
        ticket.apply(expected[name])
    for name in ["a", "b", "a", "c", None, "b", "b", None, None, "c"]:
        box.use(name)
        assert box.active == name
        assert equal(copy_of(box.model), expected[name])


def test_zeros_with_a_sign_and_nan_come_back(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-45]])
    base = copy_of(model)
    save_ticket(tmp_path / "t", {"": {"weight": torch.zeros(2, 2)}}, model)
    box = TicketBox(model)
    box.add("t", load_ticket(tmp_path / "t"))
    box.use("t")
    assert torch.equal(model.weight.view(torch.int32), torch.zeros(2, 2, dtype=torch.int32))
    box.use(None)
    assert equal(copy_of(model), base)


def test_the_parameters_stay_the_same_objects(box: TicketBox) -> None:
    before = {name: (id(p), p.data_ptr()) for name, p in box.model.named_parameters()}
    box.use("a")
    assert {name: (id(p), p.data_ptr()) for name, p in box.model.named_parameters()} == before


def test_a_ticket_takes_its_bytes_and_the_base_is_kept_once(
    box: TicketBox, tickets: dict[str, Ticket]
) -> None:
    masked = [box.model.conv1.weight, box.model.conv2.weight, box.model.fc.weight]
    kept = sum(4 * weight.numel() for weight in masked) + 4 * 2 * (8 + 12) + 8 * 2
    assert box.nbytes == {"": kept} | {name: sum(t.nbytes.values()) for name, t in tickets.items()}
    assert box.names == ["a", "b", "c"]


def test_a_ticket_is_added_while_another_is_in_use(model: nn.Module, tickets: dict[str, Ticket]) -> None:
    base, box = copy_of(model), TicketBox(model)
    box.add("a", tickets["a"])
    box.use("a")
    box.add("b", tickets["b"])
    box.add("c", tickets["c"])
    with pytest.raises(TicketError, match="'a' is in use"):
        box.add("a", tickets["b"])
    box.use("c")
    box.use(None)
    assert equal(copy_of(model), base)


def test_what_does_not_go_into_the_box(box: TicketBox, tmp_path: Path, model: nn.Module) -> None:
    other = ConvNet()
    save_ticket(tmp_path / "other", {"fc": {"weight": torch.eye(3, 12)}}, other)
    with pytest.raises(OtherBaseError):
        box.add("other", load_ticket(tmp_path / "other"))
    with pytest.raises(TicketError, match="no ticket 'other' in the box, but a, b, c"):
        box.use("other")
    box.use("a")
    LotteryJackpotPruner(model, CONFIG_LIST)
    with pytest.raises(MaskError, match="still wrapped"):
        box.use("b")


def test_a_model_of_another_type_is_left_alone(box: TicketBox) -> None:
    box.use("a")
    box.model.half()
    before = copy_of(box.model)
    with pytest.raises(OtherBaseError, match=r"another conv1\.weight"):
        box.use("b")
    assert equal(copy_of(box.model), before)


def test_an_interrupt_leaves_the_base(box: TicketBox, monkeypatch: pytest.MonkeyPatch) -> None:
    base = copy_of(box.model)
    box.use("a")

    def write(ticket: Ticket, state: dict[str, Tensor]) -> None:
        state["conv2.weight"].zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(Ticket, "write", write)
    with pytest.raises(KeyboardInterrupt):
        box.use("b")
    assert box.active is None
    assert equal(copy_of(box.model), base)
