"""``doctor``, ``--version``, ``-q``, ``-v``, and the commands in ``--help``."""

from __future__ import annotations

import subprocess
import sys
from importlib import util

import pytest
from conftest import ROOT

import nni_jackpot
from nni_jackpot import cli
from nni_jackpot.cli.boundary import Exit
from nni_jackpot.cli.command_line import _parser
from nni_jackpot.nni_bridge.compat import PATCHES


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = util.find_spec
    monkeypatch.setattr(
        "nni_jackpot.cli.doctor.find_spec", lambda name: None if name == "timm" else there(name)
    )
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"nni-jackpot {nni_jackpot.__version__}, Python 3.")
    assert f"repairs of NNI: {len(PATCHES)}" in printed
    assert "GPU" in printed
    assert "timm: without timm: pip install " in printed
    assert cli.main(["-q", "doctor"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["-v", "doctor"]) == 0
    assert capsys.readouterr().out == printed


def test_version_and_help_of_the_module() -> None:
    line = [sys.executable, "-m", "nni_jackpot", "--version"]
    made = subprocess.run(line, capture_output=True, text=True, check=True)
    assert made.stdout == f"nni-jackpot {nni_jackpot.__version__}\n"


def test_help_has_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for words in ("exit codes:", "evaluate", "deploy", "doctor", "measure a jackpot and its dense network"):
        assert words in printed
    with pytest.raises(SystemExit) as end:
        cli.main(["-q", "-v", "doctor"])
    assert end.value.code == 2


def test_the_reference_has_all_commands_and_exit_codes() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    (commands,) = (action for action in _parser()._actions if action.choices and not action.option_strings)
    assert [name for name in commands.choices or () if f"`nni-jackpot {name}" not in page] == []
    assert [code for code in Exit if f"| {int(code)} |" not in page] == []
