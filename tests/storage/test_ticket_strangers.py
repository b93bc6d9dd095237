"""Untrusted files on the command line: one line reports the error, without control characters."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from forged_tickets import good, model, more
from safetensors.torch import load_file, save_file
from torch import nn

from nni_jackpot import cli, load_ticket, save_ticket
from nni_jackpot.runtime.terminal import escaped
from nni_jackpot.storage.formats.sealed import write_sealed

CLEAR = "\x1b[2J\x1b]0;owned\x07"


def is_safe(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(command: str, *names: str, output: str | None = None) -> tuple[int, str, str]:
        """Run a command on files of the folder; return the exit code and the output."""
        line = [command, *(str(tmp_path / name) for name in names)]
        code = cli.main([*line, "-o", str(tmp_path / output)] if output else line)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_text() -> None:
    assert escaped("conv1.weight ü") == "conv1.weight ü"
    assert escaped("a\x1b[31m\n\t\0\x7f\x9b\u202e\ud800") == r"a\x1b[31m\n\t\x00\x7f\x9b\u202e\ud800"
    assert escaped("n" * 300) == "n" * 200 + "..."
    assert len(escaped("\0" * 300)) <= 4 * 200 + 3


def test_inspect_shows_names_and_metadata_escaped(run, tmp_path: Path) -> None:
    base = nn.Sequential()
    base.add_module(f"a{CLEAR}\nb", nn.Linear(4, 4))
    masks = {f"a{CLEAR}\nb": {"weight": torch.eye(4)}}
    save_ticket(tmp_path / "a.ticket", masks, base, {f"key{CLEAR}\n": [f"text{CLEAR}\x7f\x9b"], "seed": 3})
    code, out, err = run("inspect", "a.ticket")
    assert (code, err) == (0, "")
    assert is_safe(out)
    assert r"a\x1b[2J\x1b]0;owned\x07\nb.weight" in out
    assert r"key\x1b[2J" in out
    assert r"text\u001b[2J" in out
    assert "seed: 3" in out


def test_a_long_name_does_not_fill_the_screen(run, tmp_path: Path) -> None:
    base = nn.Sequential()
    base.add_module("n" * 10_000, nn.Linear(4, 4))
    save_ticket(tmp_path / "a.ticket", {"n" * 10_000: {"weight": torch.eye(4)}}, base)
    code, out, _ = run("inspect", "a.ticket")
    assert code == 0
    assert max(map(len, out.splitlines())) < 400


def test_foreign_files_are_named_escaped(run, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {f"format{CLEAR}": "pt"})
    write_sealed(tmp_path / "other", f"thing{CLEAR}", 1, {}, {})
    (tmp_path / "noise").write_bytes(struct.pack("<Q", 20) + b'{"\x1b[31m\x07": {"a":1}} ')
    (tmp_path / "text").write_text(CLEAR * 10)
    for name in ("a.safetensors", "other", "noise", "text"):
        code, out, err = run("inspect", name)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert is_safe(err)
        assert "is not a jackpot ticket" in err


@pytest.mark.parametrize(
    "value", [f'"{json.dumps(CLEAR)[1:-1]}"', "[]", '{"\\ud800": "\\ud800"}', "1e40", '"\\u202e"']
)
def test_inspect_of_forged_metadata(run, tmp_path: Path, value: str) -> None:
    forged = good(tmp_path)
    more(value)(forged)
    (tmp_path / "a.ticket").write_bytes(forged.sealed())
    code, out, err = run("inspect", "a.ticket")
    assert (code, err) == (0, "")
    assert is_safe(out)


def test_bases_of_other_names_are_named_escaped(run, tmp_path: Path) -> None:
    good(tmp_path)
    state = model().state_dict() | {f"more{CLEAR}": torch.ones(1)}
    torch.save(state, tmp_path / "base.pth")
    save_file(state, tmp_path / "base.safetensors")
    for name in ("base.pth", "base.safetensors"):
        code, out, err = run("apply", "good.ticket", name, output="out.pth")
        assert (code, out) == (2, "")
        assert is_safe(err)
        assert r"more\x1b[2J\x1b]0;owned\x07 is unknown" in err
    assert not (tmp_path / "out.pth").exists()


def test_headers_of_foreign_checkpoints_are_shown_escaped(run, tmp_path: Path) -> None:
    good(tmp_path)
    for i, text in enumerate(
        (f'{{"{CLEAR}": 3}}', '{"a": {"dtype": "\x1b[31m", "shape": [1], "data_offsets": [0, 4]}}')
    ):
        whole = text.encode()
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(struct.pack("<Q", len(whole)) + whole + bytes(4))
        code, _, err = run("apply", "good.ticket", path.name, output="out.pth")
        assert code == 2
        assert err.count("\n") == 1
        assert is_safe(err)
    # a pickle that asks for a module with such a name
    (tmp_path / "evil.pth").write_bytes(f"\x80\x02cos{CLEAR[:4]}\nsystem\n.".encode("latin-1"))
    code, _, err = run("apply", "good.ticket", "evil.pth", output="out.pth")
    assert code == 2
    assert is_safe(err)


def test_checkpoints_that_claim_to_be_larger_than_they_are(run, tmp_path: Path) -> None:
    good(tmp_path)
    state = model().state_dict()
    state["fc.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, tmp_path / "base.pth")
    assert (tmp_path / "base.pth").stat().st_size < 20_000
    code, _, err = run("apply", "good.ticket", "base.pth", output="out.pth")
    assert code == 2
    assert "fc.weight claims to be larger" in err
    state = model().state_dict() | {"positions": torch.arange(4).expand(2, 4)}
    torch.save(state, tmp_path / "base.pth")
    save_ticket(tmp_path / "more.ticket", {"fc": {"weight": torch.eye(3, 12)}}, state)
    assert run("apply", "more.ticket", "base.pth", output="out.pth")[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {1: torch.ones(1), **state},
        lambda state: state | {"fc.weight": state["fc.weight"].to_sparse()},
        lambda state: state | {"fc.weight": [1.0]},
        lambda state: {"weights_of_it": state},
    ],
)
def test_checkpoints_that_are_no_plain_state_dict(run, tmp_path: Path, change) -> None:
    good(tmp_path)
    torch.save(change(model().state_dict()), tmp_path / "base.pth")
    code, out, err = run("apply", "good.ticket", "base.pth", output="out.pth")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_any_layout_goes_into_safetensors_and_types_that_do_not_are_said(run, tmp_path: Path) -> None:
    base = model().to(memory_format=torch.channels_last)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    good(tmp_path)
    assert run("apply", "good.ticket", "base.pth", output="out.safetensors")[0] == 0
    load_ticket(tmp_path / "good.ticket").apply(base)
    made = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in base.state_dict().items())
    wide = nn.Linear(4, 4)
    wide.register_buffer("rare", torch.ones(2, dtype=torch.complex128))
    save_ticket(tmp_path / "wide.ticket", {"": {"weight": torch.eye(4)}}, wide)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    code, _, err = run("apply", "wide.ticket", "wide.pth", output="wide.safetensors")
    assert code == 2
    assert "wide.safetensors cannot be safetensors" in err
    assert not (tmp_path / "wide.safetensors").exists()
