"""Forged tickets for the tests: violations of each rule of the format, with correct digests."""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ConvNet
from torch import Tensor

from nni_jackpot import save_ticket
from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.storage import norm_statistics, tuned_values
from nni_jackpot.storage import ticket_format as rules
from nni_jackpot.storage.formats import byte_planes, coded_mask, deflated, mask_codec, sealed_format
from nni_jackpot.storage.formats.byte_planes import pack
from nni_jackpot.storage.formats.rules import Rule
from nni_jackpot.storage.formats.sealed import read_sealed
from nni_jackpot.storage.ticket import KIND

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where the fuzzer is

from forgeries import Forged

Change = Callable[[Forged], object]


def model() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet()


def good(folder: Path) -> Forged:
    """Return a ticket of the model with all kinds of masks, to be changed."""
    base = model()
    masks = {
        "conv1": {"weight": torch.rand(8, 1, 3, 3) < 0.3, "bias": None},
        "conv2": {"weight": (torch.rand(12, 1, 1, 1) < 0.5).expand(12, 8, 3, 3), "bias": torch.ones(12)},
        "fc": {"weight": torch.tensor([1, 0, 0, 1]).repeat(3, 3), "_input_0": torch.ones(12)},
    }
    save_ticket(folder / "good.ticket", masks, base, {"seed": 3})
    return Forged(*read_sealed(folder / "good.ticket", KIND, 1))


def statistics() -> dict[str, Tensor]:
    """Return the norm statistics of the model."""
    return {n: t for n, t in model().state_dict().items() if "running" in n or "num_batches" in n}


def said(**changes: Any) -> Change:
    return lambda forged: forged.content.update(changes)


def mask(**changes: Any) -> Change:
    """Change the description of a mask."""
    return lambda forged: forged.content["masks"]["conv1"]["weight"].update(changes)


def another(module: str, target: str, **described: Any) -> Change:
    """Add a mask without a stream."""
    whole = {"dtype": "float32", "shape": [8], "ones": 0, **described}
    return lambda forged: forged.content["masks"].setdefault(module, {}).update({target: whole})


def constant(**described: Any) -> Change:
    """Replace a mask by one without a stream."""

    def change(forged: Forged) -> None:
        forged.tensors.pop("mask.conv1.weight")
        another("conv1", "weight", **{"shape": [8, 1, 3, 3], **described})(forged)

    return change


def statistic(name: str, form: Any) -> Change:
    return lambda forged: forged.content["statistics"].update({name: form})


def values(name: str, value: float) -> Change:
    """Change the value of a statistic."""

    def change(forged: Forged) -> None:
        changed = statistics()
        changed[name].view(-1)[-1:] = value
        forged.set_statistics(changed)

    return change


def tuned(name: str, form: Any, value: float = 0.0) -> Change:
    """Claim that a tensor was tuned to a value."""

    def change(forged: Forged) -> None:
        if name in forged.content["base"] and name.startswith("bn"):
            forged.take_from_base(name)
        forged.content["tuned"] = {name: form}
        forged.tensors["tuned"] = from_bytes(pack([torch.full((8,), value)]))

    return change


def base_name(at: int, name: Any) -> Change:
    return lambda forged: forged.content["base"].__setitem__(at, name)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda forged: forged.tensors.update({name: change(forged.tensors[name])})


def without(name: str) -> Change:
    return lambda forged: forged.tensors.pop(name)


def with_tensor(name: str, size: int) -> Change:
    return lambda forged: forged.tensors.update({name: torch.zeros(size, dtype=torch.uint8)})


def text(old: str, new: str) -> Change:
    return lambda forged: setattr(forged, "edit_text", lambda whole: whole.replace(old, new, 1))


def more(value: str) -> Change:
    """Set the JSON text in the metadata."""
    return text('"metadata": {', f'"metadata": {{"more": {value}, ')


def header(name: str, **changes: Any) -> Change:
    return lambda forged: setattr(forged, "edit_header", lambda entries: entries[name].update(changes))


def over_another(forged: Forged) -> None:
    forged.edit_header = lambda entries: entries["statistics"].update(entries["base"])


def tail(raw: bytes) -> Change:
    return lambda forged: setattr(forged, "tail", raw)


def version(number: Any) -> Change:
    return lambda forged: setattr(forged, "version", number)


def reheaded(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change the whole header of a file."""

    def edit(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + size])
        change(entries)
        whole = json.dumps(entries).encode()
        return len(whole).to_bytes(8, "little") + whole + raw[8 + size :]

    return edit


def with_header(whole: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: len(whole).to_bytes(8, "little") + whole


# Violations of the rules of the file, byte by byte.
FILES: dict[Rule, list[Callable[[bytes], bytes]]] = {
    sealed_format.HEAD: [lambda raw: raw[:7], lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw[:60], lambda raw: b""],
    sealed_format.HEADER_SIZE: [with_header(f"[{','.join(['[]'] * 200_000)}]".encode()), with_header(b" " * 600_000)],
    sealed_format.VALUES: [with_header(f"[{','.join(['[]'] * 40_000)}]".encode())],
    sealed_format.JSON: [with_header(b""), with_header(b"{"), with_header(b'"\xff"'), with_header(b'{"a": {}, "a": {}}')],
    sealed_format.ENTRY: [
        *(with_header(whole) for whole in (b"[]", b"3", b'{"__metadata__": 3}', b'{"base": 3}')),
        reheaded(lambda entries: entries["base"].pop("dtype")),
    ],
    sealed_format.METADATA: [
        reheaded(lambda entries: entries["__metadata__"].update(more="1")),
        reheaded(lambda entries: entries["__metadata__"].update({KIND: {}})),
    ],
    sealed_format.DIGEST: [lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw.replace(b"conv1.w", b"conv3.w")],
}  # fmt: skip


# Violations of the rules of a ticket's content.
def packed(raw: bytes) -> Change:
    """Replace the content by bytes in base64."""
    return lambda forged: setattr(forged, "content", base64.b64encode(raw).decode())


DEFLATED_NULL = zlib.compress(b"null")

OF_CONTENT: dict[Rule, list[Change]] = {
    deflated.DEFLATED: [
        *map(packed, (b"", b"null", DEFLATED_NULL[:-1], DEFLATED_NULL + b"x", zlib.compress(b"\xff"))),
        packed(zlib.compress(b" " * 2**20)),
        packed(zlib.compress(b" " * 2**28)),
        lambda forged: setattr(forged, "content", "no base64"),
    ],
    sealed_format.VALUES: [more(f"[{','.join(['[]'] * 40_000)}]"), more("[" * 40_000 + "]" * 40_000)],
    sealed_format.JSON: [
        *map(more, ("NaN", "-Infinity", "1e999", "9" * 41, "0." + "1" * 40, "[" * 70 + "]" * 70, "nul", '{"a":1,"a":1}')),
        *(text(f'"{key}"', f'"{key}": 1, "{key}"') for key in ("masks", "conv1", "ones", "version")),
        more("[" * 3000 + "]" * 3000),
    ],
    sealed_format.ENTRY: [
        *(header("base", dtype=dtype) for dtype in ("F33", ["U8"], 1, None)),
        *(header("base", shape=shape) for shape in ([True], [-1], [1] * 65, [0, 2**62], [2**62], [8.0], 8, None)),
        *(header("base", data_offsets=offsets) for offsets in ([0, 1, 2], [4, 0], [-4, 0], [0, 2**63], 0)),
        header("statistics", dtype="I64"),
        header("base", more=1),
    ],
    sealed_format.TILING: [tail(b"x"), tail(bytes(4096)), header("base", data_offsets=[8, 8 + 9 * 32]), over_another],
    sealed_format.ENVELOPE: [text('"version"', '"more": 1, "version"'), text('"version": 1, ', "")],
    sealed_format.VERSION: [version(0), version(-1), version(True), version(1.0), version("1"), version(None)],
    sealed_format.BYTES: [
        tensor("base", lambda raw: raw.view(torch.int8)),
        tensor("base", lambda raw: raw.view(torch.float64)),
        tensor("base", lambda raw: raw.view(-1, 4)),
    ],
    rules.CONTENT: [said(more=1), lambda forged: forged.content.pop("base"), said(metadata=[])],
    rules.MASKS: [said(masks=[]), said(masks={"conv1": None}), said(masks={"conv1": [None]})],
    rules.NAMES: [
        said(masks={"": {"conv1.weight": None}, "conv1": {"weight": None}}),
        said(masks={"a": {"b.c": None}, "a.b": {"c": None}}),
        another("", "conv1.weight", shape=[8, 1, 3, 3]),
    ],
    coded_mask.DESCRIPTION: [mask(more=1), lambda forged: forged.content["masks"]["conv1"]["weight"].pop("ones")],
    coded_mask.DTYPE: [mask(dtype="float33"), mask(dtype=1), mask(dtype=["bool"])],
    coded_mask.NUMBERS: [
        *(mask(shape=shape) for shape in ([0, 2**63], [-1], [8.0, 1, 3, 3], [True, 1, 3, 3], 8, None, "8", {})),
        *(mask(blocks=blocks) for blocks in ([1e30, 1, 1, 1], [-1, 1, 1, 1], [True] * 4, {}, None)),
        *(mask(ones=ones) for ones in (-1, True, 1.0, "1", None, [1], 2**63)),
        mask(group=[2.0, 4, 1]),
    ],
    coded_mask.SHAPE: [
        *(constant(shape=shape) for shape in ([2**33], [2**32, 2], [0, 2**62], [1] * 17)),
        another("fc", "_output_0", shape=[2**33], ones=2**33),
        another("fc", "_output_0", shape=[2**33], ones=1, blocks=[2**33]),
    ],
    coded_mask.BLOCKS: [
        constant(shape=[0, 8], blocks=[10**18, 1]),
        *(constant(blocks=blocks) for blocks in ([3, 1, 3, 3], [16, 1, 3, 3], [0, 1, 3, 3], [8], [])),
    ],
    coded_mask.ONES: [mask(ones=73), constant(ones=73), constant(shape=[0], ones=1)],
    coded_mask.STREAM: [
        *(mask(ones=0), constant(ones=3), mask(ones=72)),
        tensor("mask.conv1.weight", lambda raw: raw.repeat(4)),
        tensor("mask.conv1.weight", lambda raw: raw[:-1]),
    ],
    coded_mask.GROUP: [
        *(mask(group=group) for group in ([2, 4, 0], [], [1, 3, 0], [0, 4, 0])),
        lambda forged: forged.content["masks"]["fc"]["weight"].update(group=[1, 2, 1, 1]),
    ],
    rules.TENSORS: [
        *map(without, ("base", "statistics")),
        with_tensor("more", 1),
        with_tensor("mask.conv2.bias", 0),
        with_tensor("mask.conv3.weight", 4),
    ],
    rules.BASE: [
        *(said(base=base) for base in ("conv1.weight", {}, None)),
        *(base_name(1, name) for name in ("conv1.weight", 1, None)),
        lambda forged: forged.content["base"].append("more"),
        tensor("base", lambda raw: raw[:-32]),
        tensor("base", lambda raw: raw[:-1]),
    ],
    rules.MASKED: [
        lambda forged: forged.take_from_base("conv1.weight"),
        another("bn1", "running_mean"),
        another("conv3", "weight"),
    ],
    tuned_values.TUNED: [
        *(tuned("bn1.bias", form) for form in ("float32", ["float32"], ["int64", [8]], ["float32", [4, 2]])),
        *(tuned(name, ["float32", [8]]) for name in ("conv2.bias", "bn1.running_mean", "more", "")),
        lambda forged: (tuned("bn1.bias", ["float32", [8]])(forged), forged.content.update(tuned={})),
        lambda forged: (tuned("bn1.bias", ["float32", [8]])(forged), forged.content.update(tuned=[])),
    ],
    rules.STATISTICS: [
        *(said(statistics=forms) for forms in ([], None)),
        *(statistic("bn1.running_mean", form) for form in ("float32", ["float32"], ["float32", [8], 1], ["float32", 8])),
        statistic("conv1.weight", ["float32", [8]]),
    ],
    byte_planes.FORM: [
        statistic("bn1.running_mean", form)
        for form in (["float33", [8]], [["float32"], [8]], ["float32", [-8]], ["float32", [True]], ["int8", [0, 2**63]])
    ],
    norm_statistics.STATISTIC: [
        *(statistic(name, ["float32", [8]]) for name in ("conv9.weight", "running_mean.weight", "bn1.running_meant", "")),
        *(statistic("bn1.running_mean", form) for form in (["float32", [3, 12]], ["int64", [8]], ["complex64", [8]])),
        *(statistic("bn1.num_batches_tracked", form) for form in (["float32", []], ["int64", [8]])),
    ],
}  # fmt: skip

# Violations of the rules checked on decoding.
DECODED: dict[Rule, list[Change]] = {
    mask_codec.DECODED: [
        mask(ones=30),
        tensor("mask.conv1.weight", lambda raw: raw * 0),
    ],
    byte_planes.PACKED: [
        *(tensor("statistics", lambda raw, end=end: raw[:end]) for end in (-1, 0)),
        tensor("statistics", lambda raw: torch.cat([raw, raw])),
        lambda forged: forged.set_statistics(statistics(), zlib.compress(bytes(10**6))),
        lambda forged: forged.set_statistics(statistics(), b"noise"),
    ],
    tuned_values.TUNED_VALUES: [
        tuned("bn1.bias", ["float32", [8]], value) for value in (float("nan"), float("inf"))
    ],
    norm_statistics.VALUES: [
        *(values("bn1.running_mean", value) for value in (float("nan"), float("-inf"))),
        *(values("bn2.running_var", value) for value in (float("nan"), float("inf"), -1e-3)),
        values("bn1.num_batches_tracked", -1),
    ],
}  # fmt: skip


def cases(forgeries: dict[Rule, list[Any]]) -> list[Any]:
    return [(rule, change) for rule, changes in forgeries.items() for change in changes]
