"""What an import and a command do without: modules that take seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

import nni_jackpot
from nni_jackpot.cli.command_line import _parser

HEAVY = ("torch", "nni", "transformers", "pytorch_lightning", "torchvision", "sklearn", "scipy")
OF_NNI = ("nni.compression", "transformers", "pytorch_lightning", "sklearn")
COMMANDS = """
from contextlib import suppress
from nni_jackpot import cli
for line in {lines}:
    with suppress(SystemExit):
        cli.main(line.split())
"""
# Each answers from the arguments and the named file alone.
ANSWERED = ("--help", "search --help", "search no.yml", "search bad.yml", "export nowhere", "inspect nowhere")
TRACER = "nni.common.concrete_trace_utils.concrete_tracer"


def words_of(code: str, folder: Path) -> list[str]:
    """Run a program in a separate process, and return the words of its last line."""
    line = [sys.executable, "-c", f"import sys\n{code}"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=240, cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import nni_jackpot" + COMMANDS.format(lines=ANSWERED), HEAVY),
        (
            "from nni_jackpot import EdgePopup, apply_masks, load_ticket, register_criterion"
            + COMMANDS.format(lines=("search wrong.yml",)),
            OF_NNI,
        ),
    ],
    ids=["nothing", "without NNI"],
)
def test_what_is_not_imported(tmp_path: Path, code: str, heavy: tuple[str, ...]) -> None:
    (tmp_path / "bad.yml").write_text("data: {", "utf-8")
    (tmp_path / "wrong.yml").write_text("search: {epoch: 1}", "utf-8")
    said = f"print('imported', *[name for name in {heavy} if name in sys.modules])"
    assert words_of(f"{code}\n{said}", tmp_path) == ["imported"]


# The tests themselves import NNI before nni_jackpot.
@pytest.mark.parametrize("later", ["import nni.compression", f"import {TRACER.rpartition('.')[0]}"])
def test_nni_is_repaired_when_it_is_imported_later(tmp_path: Path, later: str) -> None:
    said = f"print(sys.modules[{TRACER!r}]._Patcher.__module__)"
    assert words_of(f"import nni_jackpot\n{later}\n{said}", tmp_path) == [
        "nni_jackpot.nni_bridge.compat.classes"
    ]


def test_every_lazy_name_is_there() -> None:
    assert {*nni_jackpot.__all__} <= {*dir(nni_jackpot)}
    for name in nni_jackpot.__all__:
        assert getattr(nni_jackpot, name) is getattr(nni_jackpot, name)
    with pytest.raises(AttributeError, match="nothing"):
        nni_jackpot.nothing  # noqa: B018


def test_every_command_is_there() -> None:
    lines = [
        ["pretrain", "x"],
        ["search", "x"],
        ["overlap", "x"],
        ["config"],
        ["report", "x"],
        ["export", "x"],
        ["inspect", "x"],
        ["apply", "x", "y", "-o", "z"],
    ]
    for line in lines:
        assert callable(resolve_name(f"nni_jackpot.cli.{_parser().parse_args(line).command}"))


def test_a_fresh_process_knows_every_registered_name() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "yaml.md"
    line = [sys.executable, "-m", "nni_jackpot", "config", "--markdown"]
    result = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=240, check=True)
    assert result.stdout == page.read_text("utf-8")
