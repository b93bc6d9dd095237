from __future__ import annotations

import dataclasses
import math
import re
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nni_jackpot.errors import MaskError, TicketError
from nni_jackpot.storage.formats.mask_codec import DECODED, CodedMask, check, decode, encode


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def n_of_m(shape: tuple[int, ...], keep: int, size: int, dim: int) -> Tensor:
    """Return a random mask that keeps ``keep`` of every ``size`` elements along a dimension."""
    shape = tuple(torch.empty(shape).movedim(dim, -1).shape)
    order = torch.rand(*shape[:-1], shape[-1] // size, size, generator=torch.Generator().manual_seed(0))
    return (order.argsort(-1) < keep).view(shape).movedim(-1, dim)


@settings(deadline=None, max_examples=150)
@given(
    grid=st.lists(st.integers(0, 9), max_size=4),
    blocks=st.lists(st.sampled_from([1, 1, 2, 3, 5]), min_size=4, max_size=4),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_mask_comes_back(grid: list[int], blocks: list[int], density: float, seed: int) -> None:
    mask = random_mask(tuple(grid), density, seed)
    for dim in range(len(grid)):
        mask = mask.repeat_interleave(blocks[dim], dim)
    coded = encode(mask)
    assert torch.equal(decode(coded), mask)
    assert coded.kept == mask.sum()
    assert CodedMask.described(coded.describe(), coded.stream) == coded


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.02, 0.001])
def test_random_masks_take_their_entropy(density: float) -> None:
    mask = random_mask((1000, 3000), density)  # more than the coder takes at once
    coded = encode(mask)
    rate = mask.sum().item() / mask.numel()
    entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate)) * mask.numel() / 8
    assert coded.bound == pytest.approx(entropy)
    assert len(coded.stream) < 1.009 * entropy + 8
    assert torch.equal(decode(coded), mask)


@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        ((1, 64, 3, 3), (48, 64, 3, 3)),  # filters
        ((48, 1, 3, 3), (48, 64, 3, 3)),  # input channels
        ((4, 2), (64, 32)),
        ((1, 1, 3, 3), (16, 16, 3, 3)),  # kernels
    ],
)
def test_blocks_are_coded_once(blocks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    grid = tuple(size // block for size, block in zip(shape, blocks, strict=True))
    mask = random_mask(grid, 0.3)
    for dim, block in enumerate(blocks):
        mask = mask.repeat_interleave(block, dim)
    coded = encode(mask)
    assert coded.blocks == blocks
    assert len(coded.stream) <= math.prod(grid) / 8 + 8
    assert torch.equal(decode(coded), mask)


def test_a_mask_that_keeps_all_or_nothing_takes_no_stream() -> None:
    for mask in (torch.ones(8, 8), torch.zeros(3), torch.tensor(1.0), torch.ones(0, 4)):
        coded = encode(mask)
        assert coded.stream == b""
        assert torch.equal(decode(coded), mask.bool())


@pytest.mark.parametrize(("keep", "size", "bits"), [(2, 4, 2.585), (1, 4, 2.0), (4, 8, 6.13), (1, 2, 1.0)])
@pytest.mark.parametrize("dim", [0, 1])
def test_patterns_take_what_they_can_be(keep: int, size: int, bits: float, dim: int) -> None:
    mask = n_of_m((64, 128, 3), keep, size, dim)
    coded = encode(mask)
    assert coded.group == (keep, size, dim)
    assert len(coded.stream) * 8 <= 1.001 * bits * mask.numel() / size + 64
    assert torch.equal(decode(coded), mask)


def test_one_weight_out_of_the_pattern_makes_it_a_mask_like_others() -> None:
    mask = n_of_m((16, 64), 2, 4, 1)
    mask[0, mask[0].logical_not().nonzero()[0]] = True
    mask[1, mask[1].nonzero()[0]] = False  # the number of ones is as before
    coded = encode(mask)
    assert coded.group is None
    assert torch.equal(decode(coded), mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    mask = random_mask((20, 20), 0.3)
    coded = encode(mask.to(dtype).t())
    assert torch.equal(decode(coded), mask.t())
    assert coded.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan"), float("inf")])
def test_other_values_are_refused(value: float) -> None:
    with pytest.raises(MaskError, match="other than 0 and 1"):
        encode(torch.tensor([0.0, 1.0, value]))


@pytest.mark.parametrize(
    "changes",
    [
        {"ones": 11},
        {"ones": -1},
        {"ones": 10**6},
        {"ones": 0},
        {"ones": True},
        {"shape": (20, 21)},
        {"shape": (1 << 20, 1 << 20)},
        {"shape": (1,) * 40},
        {"blocks": (1, 3)},
        {"blocks": (1,)},
        {"blocks": (0, 1)},
        {"group": (2, 4, 1)},
        {"group": (0, 4, 1)},
        {"dtype": "float33"},
        {"stream": b""},
        {"stream": b"abc"},
        {"stream": b"abcd" * 30},
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict) -> None:
    coded = encode(random_mask((20, 20), 0.1))
    with pytest.raises(TicketError):
        decode(dataclasses.replace(coded, **changes))


@pytest.mark.parametrize("more", [bytes(8), b"\xff" * 8, b"word" * 2])
def test_a_stream_that_goes_on_is_refused(more: bytes) -> None:
    coded = encode(random_mask((50, 100), 0.2))
    longer = dataclasses.replace(coded, stream=coded.stream + more)
    for read in (check, decode):
        with pytest.raises(TicketError, match=re.escape(DECODED.text)):
            read(longer)
        read(coded)


def test_a_mask_is_checked_in_little_memory() -> None:
    masks = [random_mask((1000, 2000), 0.1), n_of_m((1000, 2000), 2, 4, 0), torch.ones(1 << 22)]
    for coded in map(encode, masks):
        tracemalloc.start()
        try:
            check(coded)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_the_code_stays_what_it_is() -> None:
    """Old files stay readable: these bytes were written by the first version."""
    squares = torch.zeros(100)
    squares[[i * i for i in range(10)]] = 1
    pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert encode(squares).stream.hex() == "9c7b6fff4fd0516e"
    assert encode(pairs).stream.hex() == "e418780a"
