from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from nni_jackpot import cli
from nni_jackpot.experiment import run, tracking
from nni_jackpot.experiment.config import RunConfig, dump_config
from nni_jackpot.experiment.folder.result import Result, Row, save_result
from nni_jackpot.masking.methods.edge_popup import EdgePopup

FILE = ROOT / "configs" / "digits" / "resnet.yml"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configs of the searches that a command line asks for, in place of the searches."""
    configs: list[RunConfig] = []

    def search(config: RunConfig, overwrite: bool) -> Result:
        configs.append(config)
        return Result([Row("dense", 0.9 + config.seed / 100, 0.0, 0)], 0.95, 1.0, Path(config.output))

    monkeypatch.setattr(run, "search", search)
    return configs


def test_set_and_sweep(ran: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "search",
        str(FILE),
        "--set",
        "search.lr=3",
        "--sweep",
        "config_list.0.sparse_ratio=0.9,0.95",
        "--sweep",
        "seed=0,1,2",
    ]
    assert cli.main(line) == 0
    assert {config.search.settings.lr for config in ran} == {3.0}
    assert [(c.config_list[0]["sparse_ratio"], c.seed) for c in ran] == [
        (r, s) for r in (0.9, 0.95) for s in (0, 1, 2)
    ]
    assert len({config.output for config in ran}) == 6
    printed = capsys.readouterr().out
    assert "config_list.0.sparse_ratio=0.9\n" in printed
    assert printed.count("91.00 ± 1.00") == 2


def test_a_sweep_goes_on_after_the_runs_that_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searched: list[RunConfig] = []

    def search(config: RunConfig, overwrite: bool) -> Result:
        searched.append(config)
        dump_config(config, Path(config.output) / "config.yml")
        kinds = ("dense", "initial", "initial_norm", "jackpot")
        result = Result(
            [Row(kind, 0.9 + config.seed / 100, 0.0, 0) for kind in kinds], 0.95, 1.0, Path(config.output)
        )
        save_result(result)
        return result

    def seeds(*more: str) -> list[int]:
        searched.clear()
        capsys.readouterr()
        assert cli.main(["search", str(FILE), "--set", f"output={tmp_path}", *more]) == 0
        return [config.seed for config in searched]

    monkeypatch.setattr(run, "search", search)
    assert seeds("--sweep", "seed=0,1") == [0, 1]
    assert seeds("--sweep", "seed=0,1,2", "--resume") == [2]
    assert "91.00 ± 1.00" in capsys.readouterr().out  # of all three
    assert seeds("--sweep", "seed=0,1", "--resume", "--set", "device=cpu") == []  # of no consequence
    assert seeds("--sweep", "seed=0,1", "--resume", "--set", "search.lr=0.5") == [0, 1]
    assert seeds("--sweep", "seed=0,1") == [0, 1]  # as it was asked for
    later = classmethod(lambda cls: {"default": cls(lr=0.5)})
    monkeypatch.setattr(EdgePopup, "recipes", later)  # by a later version
    assert seeds("--sweep", "seed=0,1", "--resume") == [0, 1]


def test_a_sweep_of_one_value(ran: list[RunConfig]) -> None:
    assert cli.main(["search", str(FILE), "--sweep", "seed=3"]) == 0
    assert [config.seed for config in ran] == [3]


def test_a_sweep_that_begins_with_null(ran: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--set", "search.recipe=paper", "--sweep", "search.swap_limit=null,0.1"]
    assert cli.main(["search", str(FILE), *sweep]) == 0
    assert [config.search.settings.swap_limit for config in ran] == [None, 0.1]
    assert [Path(config.output).name for config in ran] == ["swap_limit=null", "swap_limit=0.1"]
    assert "search.swap_limit=null\n" in capsys.readouterr().out  # as --set takes it


def test_the_tuner_has_the_last_word(ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "tuner_parameters", lambda: {"search.lr": 7.0, "search.epochs": 3.0})
    assert cli.main(["search", str(FILE), "--set", "search.lr=3"]) == 0
    assert (ran[0].search.settings.lr, ran[0].search.epochs) == (7.0, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "nowhere.yml"], "nowhere.yml: cannot be read"),
        (["search", str(FILE), "--set", "search.epoch=1"], "did you mean epochs?"),
        (["search", str(FILE), "--set", "search.lr"], "KEY=VALUE"),
        (["search", str(FILE), "--sweep", "seed=0,x"], "seed: found 'x' (str)"),
    ],
)
def test_one_line_says_what_is_wrong(
    ran: list[RunConfig], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nni-jackpot: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert ran == []


def test_pretrain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    assert content["data"]["name"] == "digits"
    overrides = {
        "pretrain.epochs": 1,
        "pretrain.cache": tmp_path / "cache",
        "output": tmp_path / "out",
        "model.width": 2,
    }
    line = [
        "pretrain",
        str(FILE),
        *(part for key, v in overrides.items() for part in ("--set", f"{key}={v}")),
    ]
    assert cli.main(line) == 0
    (path,) = (tmp_path / "cache").glob("*.pth")
    assert f"{path}: test accuracy " in capsys.readouterr().out
