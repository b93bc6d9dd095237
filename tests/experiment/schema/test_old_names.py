"""Old names of settings work for one release, with one warning that shows the new spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from minimal_run import MINIMAL, message, write
from report_runs import Write

from nni_jackpot.experiment.config import load_config, settings_of, to_dict
from nni_jackpot.experiment.folder.result import load_result
from nni_jackpot.experiment.report.runs import find_runs
from nni_jackpot.masking.methods.edge_popup import EdgePopup

OLD = "{epochs: 3, recipe: jackpot, growth: 0.25, hardening: 0.75, adapt_norm: false}"
NEW = "{epochs: 3, recipe: default, ramp_end: 0.25, anneal_end: 0.75, norm: freeze}"


def with_search(folder: Path, search: str) -> Path:
    return write(folder, MINIMAL.replace("{epochs: 3}", search))


def test_old_names_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = [load_config(with_search(tmp_path, OLD)) for _ in range(3)]
    (said,) = caplog.messages
    assert "search.growth is now search.ramp_end" in said
    assert "search.adapt_norm: False is now search.norm: freeze" in said
    assert "search.recipe: jackpot is now search.recipe: default" in said
    assert "\n" not in said
    assert {str(config) for config in old} == {str(load_config(with_search(tmp_path, NEW)))}


def test_old_names_in_overrides(tmp_path: Path) -> None:
    path = with_search(tmp_path, NEW)
    for new, old, value in (
        ("ramp_end", "growth", 0.5),
        ("anneal_end", "hardening", None),
        ("norm", "adapt_norm", True),
    ):
        changed = load_config(path, {f"search.{old}": value})
        assert changed == load_config(path, {f"search.{new}": "adapt" if value is True else value})
    whole = load_config(path, {"search": {"epochs": 3, "growth": 0.5}})
    assert whole.search.settings == EdgePopup(ramp_end=0.5)


def test_wrong_values_of_old_names(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert "search.ramp_end: found 2 (int)" in message(path, {"search.growth": 2})
    assert "search.norm: found 1 (int), allowed: a string out of adapt, freeze" in message(
        path, {"search.adapt_norm": 1}
    )


@pytest.mark.parametrize("method", ["edge_popup", "supermask"])
def test_finished_runs_with_old_names_are_read(
    method: str, write_run: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run("old", search__method=method)
    now = load_config(folder / "config.yml")
    content = yaml.safe_load((folder / "config.yml").read_text())
    own = content["search"]
    search: dict[str, Any] = {
        **{name: own[name] for name in ("epochs", "init", "method", "lr", "momentum", "weight_decay")},
        **{"recipe": "jackpot", "growth": own.get("ramp_end"), "temperature": own.get("temperature")},
        **{"hardening": own.get("anneal_end"), "kept_score": 1.0, "pruned_score": 0.95, "swap_limit": None},
        **{"adapt_norm": True, "reestimate_norm": None, "checkpoint_every": 500, "checkpoint_minutes": 5.0},
    }
    content["search"] = search
    del content["plugins"], content["comparators"]
    (folder / "config.yml").write_text(yaml.safe_dump(content))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "settings": content}))
    (run,) = find_runs([folder]).runs
    assert run.effective["search.lr"] == own["lr"]
    assert load_config(folder / "config.yml", is_stored=True) == now
    assert load_result(folder).settings == content
    assert not caplog.messages


def test_what_a_setting_affects_is_said_on_its_field(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    everything = settings_of(config, ["weights", "accuracy", "nothing"])
    assert everything.keys() - settings_of(config).keys() == {
        *("output", "trackers", "device", "data.workers", "data.download", "pretrain.cache"),
        *("search.checkpoint_every", "search.checkpoint_minutes"),
    }
    assert settings_of(config).keys() - settings_of(config, ["weights"]).keys() == {"data.eval_batch_size"}
    assert to_dict(config)["search"]["momentum"] == 0.9
