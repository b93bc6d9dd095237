"""Corrupts tickets in every way there is, and sees that each is refused or equal, and never applied in part.

Some of the corrupted files are sealed anew, as an attacker would: their digest is right, and their content is
not. Such a file may be a ticket, if another one; it must then be applied as a whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nni_jackpot import JackpotError, load_ticket, save_ticket
from nni_jackpot.sealed import seal_of
from nni_jackpot.ticket import KIND, VERSION

NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    255,
    2**31,
    2**32,
    2**33,
    2**63,
    2**64,
    10**400,
    0.5,
    1e308,
    True,
    None,
    "1",
    [],
    {},
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
    """Two tickets of one base, their corruptions, and a count of what became of these.

    Parameters
    ----------
    folder
        For the files.
    seed
        Of all choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.path = folder / "corrupted.ticket"
        self.model, masks = build()
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        save_ticket(folder / "a.ticket", masks, self.model, {"name": "a"})
        other = {"0": {"weight": 1 - masks["0"]["weight"]}, "6": {"weight": 1 - masks["6"]["weight"]}}
        save_ticket(folder / "b.ticket", other, self.model, {"name": "b"})
        self.raw, self.other = ((folder / f"{name}.ticket").read_bytes() for name in "ab")
        with safe_open(folder / "a.ticket", framework="pt") as file:
            self.content = json.loads(file.metadata()[KIND])["content"]
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self.expected = self._applied(folder / "a.ticket")
        self.outcomes: dict[str, Counter[str]] = {}

    def corruptions(self) -> dict[str, Callable[[], bytes]]:
        """Return the ways to corrupt, by name."""
        return {
            "bits flipped": self._flip,
            "cut short": lambda: self.raw[: self.random.randrange(len(self.raw))],
            "bytes appended": lambda: self.raw + self.random.randbytes(self.random.randint(1, 64)),
            "bytes taken out": self._take_out,
            "bytes overwritten": self._overwrite,
            "spliced with another ticket": self._splice,
            "noise": lambda: self.random.randbytes(self.random.randint(0, 2000)),
            "header edited": self._edit_header,
            "content edited, sealed anew": self._edit_content,
            "streams edited, sealed anew": self._edit_streams,
        }

    def run(self, count: int) -> None:
        """Try so many corrupted tickets, all ways in turn."""
        ways = list(self.corruptions().items())
        for i in range(count):
            way, corrupt = ways[i % len(ways)]
            self.path.write_bytes(corrupt())
            self.outcomes.setdefault(way, Counter())[self._outcome()] += 1

    def _outcome(self) -> str:
        state = {name: tensor.clone() for name, tensor in self.base.items()}
        try:
            ticket = load_ticket(self.path)
            ticket.apply(state)
        except JackpotError:
            return "refused" if _same(state, self.base) else "APPLIED IN PART"
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return "CRASHED"
        if _same(state, self.expected):
            return "equal"
        # Another ticket than the one that was corrupted: what it says must be what was done, all of it.
        whole = {name: tensor.clone() for name, tensor in self.base.items()} | ticket.statistics
        for module, targets in ticket.masks.items():
            for target, mask in targets.items():
                if mask is not None:
                    whole[f"{module}.{target}"][mask == 0] = 0
        return "another, whole" if _same(state, whole) else "APPLIED IN PART"

    def _applied(self, path: Path) -> dict[str, Tensor]:
        state = {name: tensor.clone() for name, tensor in self.base.items()}
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

    def _edit_content(self) -> bytes:
        content = copy.deepcopy(self.content)
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self._edit(content)
        return self._sealed(content, self.tensors)

    def _edit_streams(self) -> bytes:
        tensors = dict(self.tensors)
        name = self.random.choice(list(tensors))
        stream = bytearray(tensors[name].numpy().tobytes())
        kind = self.random.randrange(4)
        if kind == 0:
            stream[self.random.randrange(len(stream))] ^= 1 << self.random.randrange(8)
        elif kind == 1:
            del stream[self.random.randrange(len(stream)) :]
        elif kind == 2:
            stream += self.random.randbytes(4 * self.random.randint(1, 8))
        else:
            stream[:] = self.random.randbytes(len(stream))
        tensors[name] = torch.tensor(stream, dtype=torch.uint8)
        return self._sealed(self.content, tensors)

    def _sealed(self, content: Any, tensors: dict[str, Tensor]) -> bytes:
        envelope = {"version": VERSION, "content": content}
        envelope["sha256"] = seal_of(KIND, VERSION, content, tensors)
        return save(tensors, {KIND: json.dumps(envelope)})

    def _edit(self, node: Any) -> None:
        """Change one thing somewhere in plain data: replace, drop, add or rename it."""
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
                node[key] = self.random.choice(NUMBERS)
            return


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


def main() -> None:
    """Print the table; exit with 1 if a corrupted ticket did harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="of corrupted tickets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="only see whether it runs, on next to nothing")
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        before = _peak()
        fuzzer.run(200 if args.smoke else args.count)
    seconds = time.perf_counter() - begin
    outcomes = ["refused", "equal", "another, whole", "APPLIED IN PART", "CRASHED"]
    print(" ".join(["python benchmarks/fuzz_tickets.py", *sys.argv[1:]]))
    print(f"\n{machine(torch.device('cpu'))}:\n")
    print(f"| corruption | {' | '.join(outcomes)} |\n| --- |{' --: |' * len(outcomes)}")
    rows = {**fuzzer.outcomes, "all": sum(fuzzer.outcomes.values(), Counter())}
    for way, counted in rows.items():
        print(f"| {way} | {' | '.join(str(counted[outcome]) for outcome in outcomes)} |")
    print(f"\n{rows['all'].total()} corrupted tickets, {seconds:.0f} s, {_peak() - before:.0f} MiB of memory")
    if any(rows["all"][outcome] for outcome in outcomes[3:]):
        sys.exit(1)


if __name__ == "__main__":
    main()
