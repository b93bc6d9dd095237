"""Corrupt and forge tickets in many ways, and check that none does harm.

A forged ticket has a recomputed digest, as by an attacker: the digest is right, the content is wrong. Such a
file may be another valid ticket; it must then be applied completely, and change only norm statistics and
masked weights. No file may take more memory than twice its size plus the model's size.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine
from forgeries import VALUES, Forged, Forger
from resident import give_back, growth
from torch import Tensor, nn

from nni_jackpot import JackpotError, Ticket, load_ticket, save_ticket
from nni_jackpot.storage.formats.mask_codec import decode
from nni_jackpot.storage.formats.sealed import read_sealed
from nni_jackpot.storage.ticket import KIND, VERSION
from nni_jackpot.storage.ticket_format import is_parameter, named

OUTCOMES = ["refused", "equal", "another, whole", "WRONG WEIGHTS", "CRASH, OR MUCH MEMORY"]
# Memory for the values of a header of half a MiB, which is allowed for files of any size.
ALLOWANCE = 6 << 20
STATISTICS = [
    f"{layer}.{kind}" for layer in (1, 3) for kind in ("running_mean", "running_var", "num_batches_tracked")
]


def build() -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Return a small model and masks of every kind: weights, channels, blocks, 2:4, whole, none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 16, 1), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 4)),
    )
    pairs = torch.rand(16, 4, 4).argsort(-1) < 2
    masks = {
        "0": {"weight": torch.rand(8, 3, 3, 3) < 0.1, "bias": torch.ones(8)},
        "2": {"weight": (torch.arange(8) % 3 > 0).view(8, 1, 1, 1).expand(8, 8, 3, 3)},
        "4": {"weight": (torch.rand(8, 4, 1, 1) < 0.5).repeat_interleave(2, 0).repeat_interleave(2, 1)},
        "5": {"weight": pairs.view(16, 16)},
        "6": {"weight": torch.rand(8, 16) < 0.3, "bias": None},
        "7": {"weight": torch.zeros(4, 8)},
    }
    return model, {
        module: {target: None if mask is None else mask.float() for target, mask in targets.items()}
        for module, targets in masks.items()
    }


class Fuzzer:
    """Two tickets of one base, their corruptions, and the counts of outcomes.

    Parameters
    ----------
    folder
        Folder for the files.
    seed
        Seed of all random choices.

    Attributes
    ----------
    outcomes
        Counts of outcomes, by kind of corruption.
    excess
        Maximal memory in bytes beyond twice the file plus the model and ``ALLOWANCE``.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.path = folder / "corrupted.ticket"
        self.model, masks = build()
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model_size = sum(tensor.numel() * tensor.element_size() for tensor in self.base.values())
        save_ticket(folder / "a.ticket", masks, self.model, {"name": "a"})
        other = {"0": {"weight": 1 - masks["0"]["weight"]}, "6": {"weight": 1 - masks["6"]["weight"]}}
        save_ticket(folder / "b.ticket", other, self.model, {"name": "b"})
        self.raw, self.other = (folder / "a.ticket").read_bytes(), (folder / "b.ticket").read_bytes()
        self.expected = self._applied(folder / "a.ticket")
        self.content, self.tensors = read_sealed(folder / "a.ticket", KIND, VERSION)
        self.outcomes: dict[str, Counter[str]] = {}
        self.excess = -math.inf

    def corruptions(self) -> dict[str, Callable[[], bytes]]:
        """Return the kinds of corruption, by name."""
        forger = Forger(self.base, STATISTICS, self.random)
        forged = {f"forged: {kind}": partial(self._forge, forge) for kind, forge in forger.kinds().items()}
        return {
            "bits flipped": self._flip,
            "cut short": lambda: self.raw[: self.random.randrange(len(self.raw))],
            "bytes appended": lambda: self.raw + self.random.randbytes(self.random.randint(1, 64)),
            "bytes taken out": self._take_out,
            "bytes overwritten": self._overwrite,
            "spliced with another ticket": self._splice,
            "noise": lambda: self.random.randbytes(self.random.randint(0, 2000)),
            "header edited": self._edit_header,
            "forged: anything": partial(self._forge, self._edit_content),
            "forged: streams": partial(self._forge, self._edit_streams),
            **forged,
        }

    def run(self, count: int) -> None:
        """Try ``count`` corrupted tickets, with all kinds of corruption in turn."""
        ways = list(self.corruptions().items())
        for i in range(count):
            way, corrupt = ways[i % len(ways)]
            self.path.write_bytes(corrupt())
            self.outcomes.setdefault(way, Counter())[self._outcome()] += 1

    def _outcome(self) -> str:
        state, tried = self._base_copy(), []

        def apply() -> None:
            try:
                ticket = load_ticket(self.path)
                ticket.apply(state)
                tried.append(ticket)
            except Exception as error:
                tried.append(error)

        give_back()
        grown = growth(apply)
        excess = grown - 2 * self.path.stat().st_size - self.model_size - ALLOWANCE
        self.excess = max(self.excess, excess)
        (result,) = tried
        if excess > 0:
            print(f"{grown:,.0f} bytes of memory: {type(result).__name__}", file=sys.stderr)
            return OUTCOMES[4]
        if isinstance(result, Ticket):
            return self._judged(result, state)
        if isinstance(result, JackpotError) and str(result).isprintable():
            return OUTCOMES[0] if _same(state, self.base) else OUTCOMES[3]
        print(f"{type(result).__name__}: {result!r:.200}", file=sys.stderr)
        return OUTCOMES[4]

    def _judged(self, ticket: Ticket, state: dict[str, Tensor]) -> str:
        """Classify the changes of the base: as described by the ticket, or forbidden."""
        if _same(state, self.expected):
            return OUTCOMES[1]
        statistics = ticket.statistics
        whole = self._base_copy() | statistics
        for name, target, mask in named(ticket.coded):
            if is_parameter(target):
                whole[name][~decode(mask)] = 0
        touched = [name for name in self.base if not torch.equal(_bits(state[name]), _bits(self.base[name]))]
        masked = [name for name in touched if name not in STATISTICS]
        is_allowed = set(statistics) <= set(STATISTICS) and set(masked) <= set(ticket.masked)
        is_allowed &= all(bool(((state[n] == self.base[n]) | (state[n] == 0)).all()) for n in masked)
        return OUTCOMES[2] if is_allowed and _same(state, whole) else OUTCOMES[3]

    def _base_copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.base.items()}

    def _applied(self, path: Path) -> dict[str, Tensor]:
        state = self._base_copy()
        load_ticket(path).apply(state)
        return state

    def _flip(self) -> bytes:
        raw = bytearray(self.raw)
        for _ in range(self.random.choice([1, 1, 1, 2, 8])):
            raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
        return bytes(raw)

    def _take_out(self) -> bytes:
        at = self.random.randrange(len(self.raw))
        return self.raw[:at] + self.raw[at + self.random.randint(1, 64) :]

    def _overwrite(self) -> bytes:
        at, count = self.random.randrange(len(self.raw)), self.random.randint(1, 64)
        filling = self.random.choice([bytes(count), b"\xff" * count, self.random.randbytes(count)])
        return (self.raw[:at] + filling + self.raw[at + count :])[: len(self.raw)]

    def _splice(self) -> bytes:
        at = self.random.randrange(min(len(self.raw), len(self.other)))
        first, second = self.random.sample([self.raw, self.other], 2)
        return first[:at] + second[at:]

    def _edit_header(self) -> bytes:
        size = int.from_bytes(self.raw[:8], "little")
        header = json.loads(self.raw[8 : 8 + size])
        self._edit(header)
        text = json.dumps(header).encode()
        claimed = self.random.choice([len(text), len(text), len(text), 0, 2**31, 2**64 - 1])
        return claimed.to_bytes(8, "little") + text + self.raw[8 + size :]

    def _forge(self, change: Callable[[Forged], None]) -> bytes:
        forged = Forged(copy.deepcopy(self.content), dict(self.tensors))
        change(forged)
        return forged.sealed()

    def _edit_content(self, forged: Forged) -> None:
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self._edit(forged.content)

    def _edit_streams(self, forged: Forged) -> None:
        name = self.random.choice(list(forged.tensors))
        stream = bytearray(forged.tensors[name].numpy().tobytes())
        kind = self.random.randrange(4)
        if kind == 0:
            stream[self.random.randrange(len(stream))] ^= 1 << self.random.randrange(8)
        elif kind == 1:
            del stream[self.random.randrange(len(stream)) :]
        elif kind == 2:
            stream += self.random.randbytes(4 * self.random.randint(1, 8))
        else:
            stream[:] = self.random.randbytes(len(stream))
        forged.tensors[name] = torch.tensor(stream, dtype=torch.uint8)

    def _edit(self, node: Any) -> None:
        """Make one random edit in plain data: replace, remove, add or rename a value."""
        while isinstance(node, dict | list) and node:
            key = self.random.choice(list(node) if isinstance(node, dict) else range(len(node)))
            child = node[key]
            if isinstance(child, dict | list) and child and self.random.random() < 0.85:
                node = child
                continue
            kind = self.random.randrange(4)
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[self.random.choice(["", "x", "0", "weight", str(key) + "."])] = node.pop(key)
            elif kind == 2 and isinstance(child, int | float):
                node[key] = child + self.random.choice([-1, 1, 2, 8, 2**31])
            else:
                node[key] = self.random.choice(VALUES)
            return


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(_bits(a[name]), _bits(b[name])) for name in a)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def main() -> None:
    """Print the table; exit with 1 if a corrupted ticket did harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="number of corrupted tickets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs, on tiny inputs")
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        fuzzer.run(200 if args.smoke else args.count)
    seconds = time.perf_counter() - begin
    print(" ".join(["python benchmarks/fuzz_tickets.py", *sys.argv[1:]]))
    print(f"\n{machine(torch.device('cpu'))}:\n")
    print(f"| corruption | {' | '.join(OUTCOMES)} |\n| --- |{' --: |' * len(OUTCOMES)}")
    rows = {**fuzzer.outcomes, "all": sum(fuzzer.outcomes.values(), Counter())}
    for way, counted in rows.items():
        print(f"| {way} | {' | '.join(str(counted[outcome]) for outcome in OUTCOMES)} |")
    taken = (fuzzer.excess + ALLOWANCE) / 2**20
    print(f"\n{rows['all'].total()} corrupted tickets in {seconds:.0f} s")
    print(f"memory: at most {taken:.2f} MiB above twice the file and the model")
    if any(rows["all"][outcome] for outcome in OUTCOMES[3:]):
        sys.exit(1)


if __name__ == "__main__":
    main()
