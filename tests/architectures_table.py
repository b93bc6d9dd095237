"""Writes the part of docs/support.md that says which architectures are searched: run me.

All of them are checked, the heavy ones too, which takes minutes. Nothing is written unless the law holds for each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from architectures import ARCHITECTURES
from support_table import ARCHITECTURES_BEGIN, ARCHITECTURES_END, TABLE, architectures_part

HEAD = """## Architectures

What a network computes with its masks is, bit for bit, what a fresh copy computes once `apply_masks` has written
their zeros into it. Checked by `python tests/architectures_table.py`, which wrote this part, for networks with random
weights, as published or as small as their constructors take. Half of the weights are searched away in all layers of
the types named.

| architecture | types of layers | weights searched | result |
|---|---|---|---|
"""


def rows() -> Iterator[str]:
    """Check all architectures, and describe each by a row."""
    for library, architectures in ARCHITECTURES.items():
        for name, architecture in architectures.items():
            print(f"{library}: {name}", file=sys.stderr)
            found = architecture.check()
            types = ", ".join(f"`{kind}`" for kind in architecture.op_types)
            yield f"| {library}: {name} | {types} | {found.weights:,} | searched, equal |\n"


if __name__ == "__main__":
    part = f"{ARCHITECTURES_BEGIN}\n{HEAD}{''.join(rows())}{ARCHITECTURES_END}\n"
    text = TABLE.read_text(encoding="utf-8")
    before = architectures_part()
    TABLE.write_text(text.replace(before, part) if before else f"{text}{part}", encoding="utf-8")
