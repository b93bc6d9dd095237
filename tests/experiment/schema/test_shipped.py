"""Shipped configs and examples are found by name, in the source and in a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from nni_jackpot import cli
from nni_jackpot.experiment.schema import shipped
from nni_jackpot.experiment.schema.shipped import config_file, shipped_files


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The package may be installed: its files are copies then.
    own = (ROOT / "configs" / "digits" / "resnet.yml").read_text()
    for name in ("digits/resnet", "digits/resnet.yml", "configs/digits/resnet.yml"):
        assert config_file(Path(name)).read_text() == own
    assert shipped_files()["quickstart"].read_text() == (ROOT / "examples" / "quickstart.py").read_text()
    assert len(shipped_files()) == len([*ROOT.glob("configs/*/*.yml"), *ROOT.glob("examples/*.py")])
    Path("digits").mkdir()
    Path("digits/resnet").write_text("")
    assert config_file(Path("digits/resnet")) == Path("digits/resnet")
    assert config_file(Path("elsewhere/entirely.yml")) == Path("elsewhere/entirely.yml")


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["examples"]) == 0
    assert {"digits/resnet", "quickstart"} <= {*capsys.readouterr().out.split()}
    assert cli.main(["examples", "quickstart"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert cli.main(["examples", "quikstart"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err
    assert cli.main(["search", "digits/resnt"]) == 2
    assert "did you mean digits/resnet?" in capsys.readouterr().err
    assert cli.main(["search", "digits/resnet", "--set", "search.epochs=x"]) == 2
    assert "search.epochs: found 'x'" in capsys.readouterr().err


def test_a_wheel_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("nni_jackpot", "configs", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    line = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    made = subprocess.run(line, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    monkeypatch.setattr(shipped, "_PACKAGE", folder / "nni_jackpot")
    names = shipped_files()
    assert names["digits/resnet"] == folder / "nni_jackpot" / "configs" / "digits" / "resnet.yml"
    monkeypatch.undo()
    assert list(names) == list(shipped_files())
    assert (folder / "nni_jackpot" / "py.typed").exists()
    assert (folder / "nni_jackpot" / "speedup" / "forms" / "onnx.py").exists()
