"""Text that any terminal can show: control characters are escaped, and ASCII is enough."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, TextIO, cast

_LONGEST = 2000  # characters of a message

# Control characters, and characters that change the direction of the text around them.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS}
_ESCAPES_BUT_LAYOUT = {code: escape for code, escape in _ESCAPES.items() if chr(code) not in "\n\t"}

# Characters of tables; the last row are bytes of names that the file system's encoding cannot decode.
_IN_ASCII = dict.fromkeys(map(ord, "┌┬┐├┼┤└┴┘╭╮╰╯"), "+") | {
    ord("─"): "-",
    ord("│"): "|",
    ord("±"): "+-",
    **{0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)},
}
_HANDLER = "nni_jackpot_in_ascii"


def printable(text: str) -> str:
    """Escape the control characters of a text, except newlines and tabs."""
    return text.translate(_ESCAPES_BUT_LAYOUT)


def one_line(text: str) -> str:
    """Return a text as one line of printable characters; the middle of a very long text is left out."""
    line = " ".join(part.strip() for part in text.split("\n") if part.strip()).translate(_ESCAPES)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def escaped(text: object, most: int = 200) -> str:
    """Escape all unprintable characters of an untrusted text, cut to its first ``most`` characters."""
    whole = str(text)
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in whole[:most]
    )
    return f"{shown}..." if len(whole) > most else shown


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: undecodable bytes of file names are escaped."""
    return printable(text).encode("utf-8", _HANDLER).decode()


@contextmanager
def any_terminal() -> Iterator[None]:
    """Make everything printed in the block printable, in characters that stdout and stderr can encode."""
    with ExitStack() as changes:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                changes.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors=_HANDLER)
        changes.enter_context(redirect_stdout(cast(TextIO, _Printable(sys.stdout))))
        yield


class _Printable:
    """A stream that escapes text by `printable` before writing it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text, end = error.object[error.start : error.end], error.end
    if text.endswith("±") and error.object[end : end + 1] == " ":
        end += 1  # two characters replace two, so that columns stay aligned
    return text.translate(_IN_ASCII).encode("ascii", "backslashreplace").decode(), end


codecs.register_error(_HANDLER, _in_ascii)
