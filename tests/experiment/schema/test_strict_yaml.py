"""YAML of any content is read, or refused in a line, at a cost that its length bounds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nni_jackpot.experiment.schema import strict_yaml


def doubling(levels: int, form: str) -> str:
    """Return a few hundred bytes that stand for 8 ** levels values."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} " + form % ", ".join([f"*a{i - 1}"] * 8) for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize("like_nni", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "levels"),
        ("{" * 100_000, "levels"),
        ("- " * 100_000, "levels"),
        ("? " * 100_000, "levels"),
        ("a: " + "[" * 60 + "]" * 60, "levels"),
        ("[" + "a," * 60_000 + "]", "keys and values"),
        (doubling(12, "[%s]"), "those of aliases included"),
        (doubling(12, "{<<: [%s]}"), "those of aliases included"),
        (doubling(12, "{? [%s] : 1}"), "aliases included"),
        ("a: 0x" + "f" * 5000, "more than 1,000 characters, line 1, column 4"),
        ("a: 0b" + "1" * 50_000, "more than 1,000 characters"),
        ("a: 1" + ":1" * 5000, "more than 1,000 characters"),
        ("a: 1" + ":1" * 5000 + ".5", "more than 1,000 characters"),
        ("9" * 1001 + ": 1", "more than 1,000 characters"),
        ("!!bool x", "not of the kind that its tag says"),
        ("!!int ''", "not of the kind that its tag says"),
        ("!!float ''", "not of the kind that its tag says"),
        ("!!timestamp x", "not of the kind that its tag says"),
        ('"\\UFFFFFFFF"', "OverflowError"),
        ("!!int x", "invalid literal"),
        ("a: b: c", "line 1, column 5"),
        ("\ta: 1", "line 1, column 1"),
        ("a: 1\na: 2", "the key 'a' appears twice, line 2, column 1"),
        ("a: 'b", "found unexpected end of stream"),
        ("a: \0", "special characters"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("%YAML " + "9" * 5000 + ".1\n---\na", "limit"),
    ],
)
def test_what_is_refused_is_refused_in_a_line(text: str, words: str, like_nni: bool) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        strict_yaml.parse(text, like_nni=like_nni)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {k: 1}\nb: {<<: *x, l: 2}", {"a": {"k": 1}, "b": {"k": 1, "l": 2}}),
        ("a: " + "[" * 40 + "]" * 40, None),
        ("a: 1" + "0" * 900, {"a": 10**900}),
        ("a: 1e-3", {"a": 1e-3}),
        ("a: .inf", {"a": float("inf")}),
        ("[" + "a," * 10_000 + "]", ["a"] * 10_000),
    ],
)
def test_what_people_write_is_read(text: str, content: object) -> None:
    read = strict_yaml.parse(text)
    assert content is None or read == content


def test_nni_reads_another_number() -> None:
    assert strict_yaml.parse("1e-3", like_nni=True) == "1e-3"
    assert strict_yaml.parse("1e-3") == 1e-3


def test_an_alias_to_itself_ends() -> None:
    read = strict_yaml.parse("&a [*a]")
    assert isinstance(read, list)
    assert read[0] is read


def test_files_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"#" * (1 << 21))
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        strict_yaml.read(tmp_path / "long")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="allowed: a file"):
            strict_yaml.read(path)
    with pytest.raises(IsADirectoryError):
        strict_yaml.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        strict_yaml.read(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "long")
    (tmp_path / "long").write_bytes(b"a: 1")
    assert strict_yaml.read(tmp_path / "link") == b"a: 1"
