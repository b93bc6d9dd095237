from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_runs import write_file

from nni_jackpot import cli, load_masks, mask_overlap
from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment import overlap as overlaps
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.folder.result import Result, Row
from nni_jackpot.experiment.overlap import Comparison, overlap, save
from nni_jackpot.experiment.run import search
from nni_jackpot.masking.criteria import CRITERIA


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_file(
        tmp_path,
        data={"train_images": None},
        model={"width": 4},
        search={"epochs": 1, "recipe": "paper", "lr": 1.0},
        finetune={"under": "initial"},
    )


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    def result(name: str) -> Result:
        rows = [Row("dense", 0.99, 0.0, 0), *(Row(name, value, 0.9, 0) for value in (0.5, 0.75, 0.875))]
        return Result(rows, 0.96, 1.0, tmp_path / name)

    overlaps = {a: {b: 0.96 if a == b else 0.85 for b in CRITERIA} for a in CRITERIA}
    return Comparison({name: result(name) for name in CRITERIA}, overlaps, tmp_path)


def test_one_command(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["overlap", str(config_file)]) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("by chance: ")[1].split()[0]) == pytest.approx(68, abs=0.1)
    out = tmp_path / "out"
    assert len(list((tmp_path / "cache").glob("*.pth"))) == 1  # one network for all of them
    assert not list(out.glob("*/initial_tuned"))
    starts, jackpots = (
        {name: load_masks(out / f"init={name}" / file) for name in CRITERIA}
        for file in ("start.pth", "masks.pth")
    )
    with (out / "overlap.csv").open() as file:
        lines = {line["mask"]: line for line in csv.DictReader(file)}
    assert list(lines) == list(CRITERIA)
    for name, line in lines.items():
        for other in CRITERIA:
            expected = 100 * mask_overlap(starts[name], jackpots[other]).total
            assert line[f"{other}'s"] == f"{expected:.2f}"
        assert line["overlap"] == line[f"{name}'s"]
        assert line["overlap"] in printed
    # A random mask and a jackpot that knows nothing of it are independent. Of n weights, k of which either
    # keeps, they agree by chance on all but 2 (k - x), where x is hypergeometric: within five deviations.
    masks = [mask for targets in starts["random"].values() for mask in targets.values() if mask is not None]
    n, k = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    deviation = 100 * 2 * k * (n - k) / (n * (n - 1) ** 0.5) / n
    assert float(lines["random"]["magnitude's"]) == pytest.approx(68, abs=5 * deviation)
    assert not list(tmp_path.rglob("*.part"))


def test_masks_are_of_the_seed_s_network(config_file: Path) -> None:
    config = load_config(config_file, {"finetune.epochs": 0, "search.init": "snip"})
    alone = load_masks(search(config).folder / "start.pth")
    compared = load_masks(overlap(config).folder / "init=snip" / "start.pth")
    assert mask_overlap(alone, compared).total == 1.0


def test_what_is_saved(comparison: Comparison) -> None:
    names = {path.name for path in save(comparison)}
    assert names - {"overlap.png"} == {"overlap.md", "overlap.csv"}
    assert ("overlap.png" in names) == (importlib.util.find_spec("matplotlib") is not None)
    assert all((comparison.folder / name).stat().st_size for name in names)
    markdown = (comparison.folder / "overlap.md").read_text()
    assert "| magnitude | 50.00 |" in " ".join(markdown.split())
    assert "by chance: 82.00" in markdown


def test_without_matplotlib(
    config_file: Path,
    comparison: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(overlaps, "overlap", lambda config, overwrite: comparison)
    assert cli.main(["overlap", str(config_file)]) == 0
    assert "nni-jackpot[plot]" in capsys.readouterr().out
    assert not (comparison.folder / "overlap.png").exists()


def test_a_sweep_is_a_table_each(
    config_file: Path,
    comparison: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs: list[RunConfig] = []
    monkeypatch.setattr(overlaps, "overlap", lambda config, overwrite: configs.append(config) or comparison)
    assert cli.main(["overlap", str(config_file), "--sweep", "config_list.0.sparse_ratio=0.5,0.9"]) == 0
    assert [Path(config.output).name for config in configs] == ["sparse_ratio=0.5", "sparse_ratio=0.9"]
    assert capsys.readouterr().out.count("config_list.0.sparse_ratio=0.") == 2


def test_no_trial(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    with pytest.raises(JackpotError, match="use search"):
        overlap(load_config(config_file))
