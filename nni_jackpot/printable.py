"""Text from strangers as one line that no terminal acts on."""

from __future__ import annotations


def printable(text: object, most: int = 200) -> str:
    """Escape what is not printable, such as line ends, and cut the text after so many characters."""
    whole = str(text)
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in whole[:most]
    )
    return f"{shown}..." if len(whole) > most else shown
