"""The file of a run with no more in it than it needs; no test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from nni_jackpot.errors import ExperimentConfigError
from nni_jackpot.experiment.config import (
    load_config,
)

MINIMAL = """
output: runs/x
data: {name: digits}
model: {}
pretrain: {epochs: 2, lr: 0.1}
config_list:
  - {op_types: [Conv2d], sparse_ratio: 0.9}
  - op_names: [fc]
    target_settings: {weight: {granularity: default}}
search: {epochs: 3}
finetune: {epochs: 1, lr: 1e-2}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ExperimentConfigError) as caught:
        load_config(path, overrides or {})
    assert type(caught.value) is ExperimentConfigError
    assert str(path) in str(caught.value)
    return str(caught.value)
