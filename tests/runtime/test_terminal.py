"""Any terminal can show the output, which contains no control characters."""

from __future__ import annotations

import io
import sys

import pytest
from prettytable import PrettyTable, TableStyle

from nni_jackpot.runtime.terminal import any_terminal, one_line, printable

HOSTILE = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202eabc", "\x7f", "\x08\x08"]


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_shown_as_escapes(text: str) -> None:
    for shown in (printable(text), one_line(text)):
        assert shown.isprintable()
        assert "\\x" in shown or "\\u" in shown


def test_layout_stays_in_a_text_and_goes_in_a_line() -> None:
    assert printable("a\n\tb") == "a\n\tb"
    assert one_line("  a\n    b\tc\n\n") == "a b\\x09c"
    long = one_line("a" + "x" * 10**6 + "b")
    assert len(long) < 3000
    assert long[0] + long[-1] == "ab"
    assert one_line("é ± ─") == "é ± ─"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_printed_is_printable(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with any_terminal():
        print(text)
    assert capsys.readouterr().out == printable(text) + "\n"


def printed(encoding: str, *texts: str, monkeypatch: pytest.MonkeyPatch) -> str:
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with any_terminal():
        print(*texts, sep="\n")
    assert stream.errors == "strict"  # as it was
    stream.flush()
    return content.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_table_keeps_its_shape_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = PrettyTable(["jackpot", "±"])
    table.set_style(TableStyle.SINGLE_BORDER)
    table.add_rows([["97.22 ± 0.10", "│"], ["1", "x"]])
    lines = printed(encoding, table.get_string(), monkeypatch=monkeypatch).splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines if "±" not in line or encoding == "utf-8"}) == 1
    assert "97.22" in lines[3]
    if encoding == "utf-8":
        assert lines == table.get_string().splitlines()
    else:
        assert lines[0].strip("+-") == ""
    if encoding == "ascii":
        assert "97.22 +-0.10" in lines[3]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_names_that_no_encoding_has_are_shown_as_bytes(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = b"runs/\xff\x80".decode("utf-8", "surrogateescape")
    assert printed(encoding, name, monkeypatch=monkeypatch) == "runs/\\xff\\x80\n"


def test_other_characters_are_shown_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed("ascii", "日 é", monkeypatch=monkeypatch) == "\\u65e5 \\xe9\n"
