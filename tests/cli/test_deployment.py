"""``evaluate`` and ``deploy``: a finished run or its ticket, measured again, and written in a form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import command, write_file

from nni_jackpot import cli
from nni_jackpot.speedup.forms import FORMS

FORM = '''
import torch
from nni_jackpot.errors import MaskError
from nni_jackpot.speedup import Form, register_form

@register_form("plain")
class Plain(Form):
    """The masked state dict, for masks with zeros."""

    suffix = ".pth"
    tolerance = 0.0

    def check(self, jackpot):
        if all(mask.bool().all() for own in jackpot.masks.values() for mask in own.values()):
            raise MaskError("plain needs masks with zeros")

    def write(self, jackpot, path):
        torch.save(jackpot.model.state_dict(), path)

    def load(self, path, jackpot):
        state = torch.load(path, weights_only=True)
        return lambda *args: torch.func.functional_call(jackpot.model, state, args)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, with a ticket."""
    folder = tmp_path_factory.mktemp("run")
    assert command("search", write_file(folder), "finetune.epochs=0") == 0
    assert cli.main(["export", str(folder / "out")]) == 0
    return folder / "out"


def test_evaluate_repeats_the_numbers_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["kind"]: row for row in json.loads((run / "results.json").read_bytes())["rows"]}
    for place in (run, run / "jackpot.ticket"):
        assert cli.main(["evaluate", str(place)]) == 0
        printed = capsys.readouterr().out
        for kind in ("dense", "jackpot"):
            cells = next(line for line in printed.splitlines() if kind in line).split("│")
            assert cells[2].strip() == f"{100 * rows[kind]['accuracy']:.2f}"
            assert cells[3].strip() == f"{100 * rows[kind]['sparsity']:.2f}"


def test_a_form_from_outside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert FORM.count("\n") <= 30
    (tmp_path / "my_form.py").write_text(FORM)
    monkeypatch.chdir(tmp_path)
    line = ["deploy", str(run), "--form", "plain"]
    try:
        assert cli.main(line) == 2
        assert "--form: found plain, allowed: " in capsys.readouterr().err
        for place in (run, run / "jackpot.ticket"):
            assert cli.main(["deploy", str(place), *line[2:], "--plugin", "my_form"]) == 0
            assert "plain, " in capsys.readouterr().out
            state = torch.load(run / "deployed" / "plain.pth", weights_only=True)
            found = torch.load(run / "jackpot.pth", weights_only=True)
            assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
    finally:
        FORMS._objects.pop("plain", None)
        FORMS._origins.pop("plain", None)
        sys.modules.pop("my_form", None)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--form", "csr"], "the masks prune no linear layer and no 1x1 convolution"),
        (["--form", "2:4"], "the masks prune no linear layer and no 1x1 convolution with multiples of 32"),
        (["--form", "hf"], "hf is for networks of transformers"),
        (["--form", "csr", "--plugin", "nowhere"], "--plugin: cannot import 'nowhere'"),
        (["--form", "csr", "--config", "x.yml"], "--config is for tickets"),
    ],
)
def test_what_cannot_be_deployed(
    words: list[str], wanted: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "it"
    assert cli.main(["deploy", str(run), *words, "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert said.count("\n") == 1
    assert not output.parent.exists()


def test_what_a_ticket_needs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "alone.ticket"
    alone.write_bytes((run / "jackpot.ticket").read_bytes())
    assert cli.main(["evaluate", str(alone)]) == 2
    assert "name its run's YAML file by --config FILE" in capsys.readouterr().err
    assert cli.main(["evaluate", str(alone), "--config", str(run / "config.yml")]) == 0
    elsewhere = f"pretrain.cache={tmp_path / 'empty'}"
    assert cli.main(["evaluate", str(run), "--set", elsewhere]) == 2
    assert "the pre-trained weights are not there" in capsys.readouterr().err


def test_code_of_a_run_is_not_imported_by_itself(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket, config = tmp_path / "jackpot.ticket", tmp_path / "config.yml"
    ticket.write_bytes((run / "jackpot.ticket").read_bytes())
    text = (run / "config.yml").read_text()
    config.write_text(text.replace("plugins: []", "plugins: [hostile]"))
    (tmp_path / "hostile.py").write_text("raise SystemExit(3)")
    assert "hostile" in config.read_text()
    assert cli.main(["evaluate", str(ticket)]) == 2
    assert "imported only on request: add --plugin hostile" in capsys.readouterr().err
