"""The install command names the place that the package was installed from."""

from __future__ import annotations

import configparser
import json
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from conftest import ROOT

from nni_jackpot.errors import MissingLibraryError
from nni_jackpot.runtime import extras
from nni_jackpot.runtime.extras import EXTRAS, install_command, library


def installed(monkeypatch: pytest.MonkeyPatch, installer: str | None, origin: object) -> None:
    files = {"INSTALLER": installer, "direct_url.json": origin and json.dumps(origin)}

    class Fake:
        def read_text(self, name: str) -> Any:
            return files[name]

    monkeypatch.setattr(extras, "distribution", lambda name: Fake())


@pytest.mark.parametrize(
    ("installer", "origin", "command"),
    [
        ("pip\n", None, 'pip install "nni-jackpot[plot]"'),
        ("uv", None, 'uv pip install "nni-jackpot[plot]"'),
        (
            "pip",
            {"url": "file:///a%20b/src", "dir_info": {}},
            'pip install "nni-jackpot[plot] @ file:///a%20b/src"',
        ),
        (
            "pip",
            {"url": "file:///src", "dir_info": {"editable": True}},
            'pip install -e "nni-jackpot[plot] @ file:///src"',
        ),
        (
            "pip",
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            'pip install "nni-jackpot[plot] @ git+https://host/x.git@v1"',
        ),
        (None, [], 'pip install "nni-jackpot[plot]"'),
    ],
)
def test_command(
    installer: str | None, origin: object, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, installer, origin)
    assert install_command("plot") == command


def test_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    monkeypatch.setattr(extras, "__file__", str(ROOT / "nni_jackpot" / "runtime" / "extras.py"))
    assert install_command("plot") == f'pip install -e "{ROOT}[plot]"'
    monkeypatch.setattr(extras, "__file__", "/nowhere/a/b/c.py")
    assert install_command("transformers") == "pip install transformers accelerate"


def test_a_missing_library() -> None:
    with pytest.raises(MissingLibraryError, match="no_such_library is not installed, which tests need: "):
        library("no_such_library", "plot", "tests need")


def test_extras_are_those_of_the_package() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = parser["options.extras_require"]
    assert wanted.keys() - EXTRAS.keys() == {"docs", "test"}
    for extra, modules in EXTRAS.items():
        for module in modules:
            assert module in wanted[extra]
