"""Forged tickets: content changed by an attacker who knows the format, with a recomputed digest.

Each forgery has one kind and a correct digest. Many contradict themselves, the format or the base; some are
valid tickets with other content.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nni_jackpot.runtime.tensor_bytes import from_bytes
from nni_jackpot.storage.formats.byte_planes import pack
from nni_jackpot.storage.formats.mask_codec import encode
from nni_jackpot.storage.formats.sealed import DTYPES, name_of, seal_of
from nni_jackpot.storage.formats.sealed_format import TYPES
from nni_jackpot.storage.ticket import KIND

NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 4, 8, 9, 255, 2**31, 2**32, 2**33, 2**62, 2**63, 2**64, 10**30, 10**400]
VALUES = [
    *NUMBERS,
    0.5,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    "1",
    "",
    [],
    {},
    [[]],
    {"": 0},
]
NAMES = [
    "",
    ".",
    "weight",
    "0",
    "0.weight",
    "running_mean",
    "1.running_mean",
    "1.weight",
    "_input_0",
    "\x1b[31m",
]
NAMES += [
    "a\nb",
    "a\0b",
    "\x9b2J",
    "\u202e",
    "ü",
    "\U0001f600",
    "n" * 5000,
    "__metadata__",
    "mask.0.weight",
    "base",
]
SHAPES: list[Any] = [[], [0], [1], [8], [3, 8], [0, 2**63], [0, 2**62], [2**33], [2**32], [2**26], [1] * 40]
SHAPES += [[2**16, 2**16], [-1], [1e30], [True], [8.0], ["8"], [[8]], None, 8, [2**20] * 20]
TEXTS = [
    *("[" * deep + "]" * deep for deep in (10, 64, 100, 900, 5000)),
    "NaN",
    "1e999",
    "-Infinity",
    "1E2",
    "-0",
]
TEXTS += [
    "9" * 40,
    "9" * 100,
    "9" * 5000,
    "1." + "0" * 100,
    '"\\ud800"',
    '"\\u001b[31m"',
    '{"a":1,"a":2}',
    "{}]",
    "nul",
]
CODES = {dtype: code for code, dtype in TYPES.items()}


@dataclass
class Forged:
    """A ticket to change: its content, its tensors, and edits of their serialized form.

    Attributes
    ----------
    content
        Plain data of the ticket.
    tensors
        Tensors by name.
    version
        Version in the file.
    edit_text
        Edits the JSON of version and content.
    edit_header
        Edits the header except its metadata.
    tail
        Bytes after the tensors.
    """

    content: dict[str, Any]
    tensors: dict[str, Tensor]
    version: Any = 1
    edit_text: Callable[[str], str] = field(default=lambda text: text)
    edit_header: Callable[[dict[str, Any]], None] = field(default=lambda header: None)
    tail: bytes = b""

    def sealed(self) -> bytes:
        """Return the bytes of the file, with the digest that a lenient reader computes."""
        text = self.edit_text(json.dumps({"version": self.version, "content": self.content}))
        header: dict[str, Any] = {}
        data = b""
        for name, tensor in self.tensors.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            places = [len(data), len(data) + len(raw)]
            header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
            data += raw
        self.edit_header(header)
        seal = _seal(text, {name: _read(entry, data) for name, entry in header.items()})
        metadata = f'{text[:-1]}, "sha256": "{seal}"}}'
        whole = json.dumps({"__metadata__": {KIND: metadata}, **header}).encode()
        return len(whole).to_bytes(8, "little") + whole + data + self.tail

    def set_statistics(self, statistics: dict[str, Tensor], packed: bytes | None = None) -> None:
        """Replace the statistics."""
        self.content["statistics"] = {n: [name_of(t.dtype), list(t.shape)] for n, t in statistics.items()}
        self.tensors["statistics"] = from_bytes(pack(list(statistics.values())) if packed is None else packed)

    def take_from_base(self, name: str) -> None:
        """Remove a tensor and its hash from the base."""
        at = self.content["base"].index(name)
        del self.content["base"][at]
        hashes = self.tensors["base"]
        self.tensors["base"] = torch.cat([hashes[: 32 * at], hashes[32 * (at + 1) :]])


class Forger:
    """Forges tickets of a base.

    Parameters
    ----------
    base
        State dict of the base.
    statistics
        Names of the norm statistics in the state dict.
    choice
        Generator of all random choices.
    """

    def __init__(self, base: dict[str, Tensor], statistics: list[str], choice: random.Random) -> None:
        self.base, self.statistics, self.random = base, statistics, choice

    def kinds(self) -> dict[str, Callable[[Forged], None]]:
        """Return the kinds of forgeries by name."""
        return {
            "a weight as a statistic": self.weight_as_statistic,
            "statistics of other values": self.other_statistics,
            "statistics deflated": self.deflated,
            "names": self.names,
            "masks of one name": self.twice,
            "other masks": self.masks,
            "sizes": self.sizes,
            "inputs and outputs": self.activations,
            "tensors": self.other_tensors,
            "header": self.header,
            "text": self.text,
        }

    def weight_as_statistic(self, forged: Forged) -> None:
        """Move a weight from the base to the statistics, with other values."""
        statistics = self._statistics()
        for name in self.random.sample(forged.content["base"], self.random.choice([1, 1, 2, 3])):
            forged.take_from_base(name)
            shape = self.random.choice([self.base[name].shape, self.base[name].shape, (8,)])
            statistics[self.random.choice([name, name, name, f"{name}.running_mean"])] = torch.rand(shape)
            if self.random.random() < 0.5:
                module, _, target = name.rpartition(".")
                forged.content["masks"].get(module, {}).pop(target, None)
                forged.tensors.pop(f"mask.{name}", None)
        forged.set_statistics(statistics)

    def other_statistics(self, forged: Forged) -> None:
        """Give statistics invalid values, types or shapes, or omit some."""
        statistics = self._statistics()
        name = self.random.choice(list(statistics))
        own = statistics[name]
        kind = self.random.randrange(5)
        if kind == 0:
            own.view(-1)[0] = self.random.choice(
                [-1, 2, 0] + ([math.nan, math.inf] if own.is_floating_point() else [])
            )
        elif kind == 1:
            statistics[name] = own.to(
                self.random.choice([torch.float16, torch.int64, torch.bool, torch.complex64])
            )
        elif kind == 2:
            statistics[name] = self.random.choice([own.new_zeros(3), own.new_zeros(2, 4), own.new_zeros(0)])
        elif kind == 3:
            del statistics[name]
        else:
            other = self.random.choice(list(statistics))
            statistics[name], statistics[other] = statistics[other], own
        forged.set_statistics(statistics)

    def deflated(self, forged: Forged) -> None:
        """Replace the deflated statistics by other bytes, up to a few million zeros."""
        zeros = zlib.compress(bytes(self.random.choice([0, 1, 100, 10**5, 4 * 10**6])), 9)
        whole = forged.tensors["statistics"].numpy().tobytes()
        packed = [zeros, whole[:-1], whole + b"x", whole + zeros, zeros[:-4], self.random.randbytes(50), b""]
        forged.set_statistics(self._statistics(), self.random.choice(packed))
        if self.random.random() < 0.5:
            name = self.random.choice(list(forged.content["statistics"]))
            forged.content["statistics"][name][1] = [self.random.choice([10**5, 10**6, 2**40])]

    def names(self, forged: Forged) -> None:
        """Rename modules, targets, or tensors of the base, of the statistics or of the file."""
        content = forged.content
        module = self.random.choice(list(content["masks"]))
        lists = [
            content["masks"],
            content["masks"][module],
            content["statistics"],
            forged.tensors,
            content["metadata"],
        ]
        named = self.random.choice(lists)
        name = self.random.choice([*NAMES, *self.base])
        if self.random.random() < 0.3:
            content["base"][self.random.randrange(len(content["base"]))] = name
        elif named:
            old = self.random.choice(list(named))
            named[name] = named.pop(old)
            if named is content["masks"]:
                for tensor in [tensor for tensor in forged.tensors if tensor.startswith(f"mask.{old}.")]:
                    forged.tensors[f"mask.{name}{tensor[5 + len(old) :]}"] = forged.tensors.pop(tensor)

    def twice(self, forged: Forged) -> None:
        """Add a second mask of a name, or a mask of a statistic."""
        name = self.random.choice([*forged.content["base"], *self.statistics])
        module, _, target = name.rpartition(".")
        mask = encode(torch.rand(self.base[name].shape) < 0.5)
        forged.content["masks"].setdefault("", {})[name] = mask.describe()
        if self.random.random() < 0.5:
            forged.content["masks"].setdefault(module, {})[target] = mask.describe()
        forged.tensors.pop(f"mask.{name}", None)
        if mask.stream:
            forged.tensors[f"mask.{name}"] = from_bytes(mask.stream)

    def masks(self, forged: Forged) -> None:
        """Add a mask of any tensor of the base or of an unknown tensor, in the right or another shape."""
        name = self.random.choice([*self.base, "8.weight"])
        shape = self.base[name].shape if name in self.base and self.random.random() < 0.8 else (8, 4)
        mask = encode(
            (torch.rand(shape) < self.random.random()).to(self.random.choice([torch.bool, torch.float16]))
        )
        module, _, target = name.rpartition(".")
        forged.content["masks"].setdefault(module, {})[target] = mask.describe()
        forged.tensors.pop(f"mask.{name}", None)
        if mask.stream and self.random.random() < 0.9:
            forged.tensors[f"mask.{name}"] = from_bytes(mask.stream)

    def sizes(self, forged: Forged) -> None:
        """Change the size, type, group, or number of ones of a mask or a statistic."""
        masks = [mask for targets in forged.content["masks"].values() for mask in targets.values() if mask]
        described = self.random.choice(masks)
        for _ in range(self.random.choice([1, 1, 2, 3])):
            key = self.random.choice(["shape", "shape", "blocks", "blocks", "ones", "group", "dtype", "more"])
            shape = described.get("shape")
            if self.random.random() < 0.5 and isinstance(shape, list) and shape:
                at = self.random.randrange(len(shape))
                changed = [*shape[:at], self.random.choice(NUMBERS), *shape[at + 1 :]]
                described["shape" if key == "shape" else "blocks"] = changed
            else:
                described[key] = self.random.choice(SHAPES + VALUES)
        if self.random.random() < 0.3:
            form = self.random.choice(list(forged.content["statistics"].values()))
            form[self.random.randrange(2)] = self.random.choice([*SHAPES, *VALUES, *DTYPES])

    def activations(self, forged: Forged) -> None:
        """Add a mask of an input or output, kept or pruned, of up to the largest size."""
        size = self.random.choice([1, 8, 2**20, 2**26, 2**32, 2**33])
        mask = {"dtype": "float32", "shape": [size], "ones": self.random.choice([0, 1, size])}
        if self.random.random() < 0.5:
            mask |= {"blocks": [size], "ones": self.random.choice([0, 1])}
        target = self.random.choice(["_input_0", "_output_0", "_input_\x1b[2J"])
        forged.content["masks"].setdefault(self.random.choice(["0", "5", "nowhere"]), {})[target] = mask

    def other_tensors(self, forged: Forged) -> None:
        """Add or remove a tensor, or change its length, type or shape."""
        name = self.random.choice(list(forged.tensors))
        kind = self.random.randrange(4)
        if kind == 0:
            del forged.tensors[name]
        elif kind == 1:
            forged.tensors[self.random.choice(NAMES)] = torch.zeros(
                self.random.choice([0, 8, 10**6]), dtype=torch.uint8
            )
        elif kind == 2:
            longer = torch.zeros(self.random.choice([32, 64, 10**6]), dtype=torch.uint8)
            forged.tensors[name] = torch.cat([forged.tensors[name], longer])
        else:
            even = forged.tensors[name][: len(forged.tensors[name]) // 8 * 8]
            forged.tensors[name] = self.random.choice(
                [even.view(torch.int8), even.view(torch.float64), even.view(-1, 4)]
            )

    def header(self, forged: Forged) -> None:
        """Let tensors overlap, leave a gap, or change their type, shape or offsets in the header."""

        def edit(header: dict[str, Any]) -> None:
            entry = self.random.choice(list(header.values()))
            key = self.random.choice(["dtype", "shape", "data_offsets", "data_offsets", "more"])
            if key == "data_offsets" and self.random.random() < 0.7:
                entry[key] = list(self.random.choice(list(header.values()))[key])
            else:
                entry[key] = self.random.choice(
                    [*SHAPES, *VALUES, *TYPES, [0, 4], [4, 0], [0, 2**63], [-4, 0]]
                )

        forged.edit_header = edit
        forged.tail = self.random.choice([b"", b"", bytes(8), bytes(4096)])

    def text(self, forged: Forged) -> None:
        """Write JSON that parsers read differently, or that needs more memory than its size."""
        count = self.random.choice([10, 1000, 10**4, 10**5])
        large = [
            lambda: f"[{','.join(['[]'] * count)}]",
            lambda: json.dumps({str(i): i for i in range(count)}),
            lambda: '"' + "a" * count + '\\ud83d\\ude00"',
        ]
        value = self.random.choice([*TEXTS] * 2 + large)
        value = value if isinstance(value, str) else value()
        keys = ["metadata", "masks", "base", "statistics", "version"]
        key = self.random.choice(["metadata"] * 3 + keys)
        if self.random.random() < 0.3:
            forged.version = self.random.choice(VALUES)
        forged.edit_text = self.random.choice(
            [
                lambda text: text.replace('"metadata": {', f'"metadata": {{"more": {value}, ', 1),
                lambda text: text.replace(f'"{key}": ', f'"{key}": {value}, "{key}": ', 1),
                lambda text: text.replace('"float32"', value, 1),
            ]
        )

    def _statistics(self) -> dict[str, Tensor]:
        values = {name: torch.rand(self.base[name].shape) for name in self.statistics}
        return {name: value.to(self.base[name].dtype) for name, value in values.items()}


def _read(entry: Any, data: bytes) -> Tensor:
    """Return the tensor of a header entry, or any tensor if the entry is invalid."""
    try:
        begin, end = entry["data_offsets"]
        return from_bytes(data[begin:end]).view(TYPES[entry["dtype"]]).view(entry["shape"])
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError):
        return torch.zeros(0)


def _seal(text: str, tensors: dict[str, Tensor]) -> str:
    try:
        said = json.loads(text)
        return seal_of(KIND, said["version"], said["content"], tensors)
    except (TypeError, ValueError, LookupError, RecursionError):
        return "0" * 64
