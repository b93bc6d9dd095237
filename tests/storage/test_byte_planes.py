from __future__ import annotations

import zlib

import pytest
import torch

from nni_jackpot.errors import TicketError
from nni_jackpot.storage.formats.byte_planes import Form, pack, unpack

TENSORS = [
    torch.randn(64, generator=torch.Generator().manual_seed(0)).exp(),
    torch.tensor(12),
    torch.full((3, 4), float("nan"), dtype=torch.bfloat16),
    torch.randn(64),
    torch.zeros(0, 5),
    torch.tensor([-0.0, float("inf")], dtype=torch.float64),
    torch.randn(6, 4).t(),
]
FORMS = [Form.of(tensor) for tensor in TENSORS]


def test_tensors_come_back_bit_for_bit() -> None:
    for tensor, back in zip(TENSORS, unpack(pack(TENSORS), FORMS), strict=True):
        assert Form.of(back) == Form.of(tensor)
        assert (
            back.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        )
        assert back.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert unpack(pack([]), []) == []


def test_statistics_take_less_than_plain_and_than_plainly_deflated() -> None:
    statistics = [torch.randn(512, generator=torch.Generator().manual_seed(i)).exp() for i in range(8)]
    raw = b"".join(tensor.numpy().tobytes() for tensor in statistics)
    assert len(pack(statistics)) < 0.9 * len(raw)
    assert len(pack(statistics)) < 0.95 * len(zlib.compress(raw, 9))


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1],
        lambda packed: packed + b"x",
        lambda packed: b"",
        lambda packed: b"noise",
        lambda packed: zlib.compress(zlib.decompress(packed) + b"x"),
        lambda packed: zlib.compress(zlib.decompress(packed)[:-1]),
    ],
)
def test_damage_is_refused(damage) -> None:
    with pytest.raises(TicketError, match="damaged"):
        unpack(damage(pack(TENSORS)), FORMS)


def test_no_more_is_inflated_than_the_forms_say() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    with pytest.raises(TicketError, match="or too many"):
        unpack(bomb, [Form("float32", (4,))])
    with pytest.raises(TicketError, match="too few"):
        unpack(pack([torch.zeros(4)]), [Form("float32", (1 << 50,))])


@pytest.mark.parametrize(
    "form", [("float33", (1,)), ("float32", (-1,)), ("float32", (1.0,)), ("bool", (True,))]
)
def test_there_are_no_such_tensors(form) -> None:
    with pytest.raises(TicketError, match="no tensor of type"):
        Form(*form)
