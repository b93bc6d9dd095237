"""The reference of all keys is generated, complete and current."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT

from nni_jackpot import cli
from nni_jackpot.experiment.config import RunConfig, stored_config, to_dict
from nni_jackpot.experiment.reference.keys import markdown, sections, yaml_text
from nni_jackpot.experiment.schema import strict_yaml


def test_the_committed_page_is_current() -> None:
    """Run ``nni-jackpot config --markdown > docs/reference/yaml.md`` to update the page."""
    assert (ROOT / "docs" / "reference" / "yaml.md").read_text(encoding="utf-8") == markdown()


def test_the_printed_file_has_every_key_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    printed = strict_yaml.parse(capsys.readouterr().out)
    required = {
        "output": "x",
        "data": {"name": "digits"},
        "pretrain": {"epochs": 1, "lr": 0.1},
        "config_list": [{"sparse_ratio": 0.5}],
        "search": {"epochs": 1},
        "finetune": {"epochs": 1, "lr": 0.1},
    }
    filled = {**printed, **required}
    filled |= {name: {**printed[name], **v} for name, v in required.items() if isinstance(v, dict)}
    config = stored_config(filled)
    assert config == stored_config({"model": {}, **required})
    assert set(to_dict(config)) - {"comparators"} == set(printed)


def test_keys_of_every_method_and_comparator_are_there() -> None:
    found = {(section.name, section.choice) for section in sections()}
    assert {("search", "method: edge_popup"), ("search", "method: supermask")} <= found
    assert ("comparators.jackpot_tuned", "") in found
    assert all(key.doc and key.allowed for section in sections() for key in section.keys)
    assert "recipe paper: 100.0" in yaml_text()
    assert RunConfig.__name__ not in yaml_text()
    assert yaml.safe_load(yaml_text())["search"]["momentum"] == 0.9
