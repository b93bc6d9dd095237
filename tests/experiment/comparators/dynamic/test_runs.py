"""Every comparator whose masks change runs from a YAML file, and ends with its exact number of zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import write_file

from nni_jackpot.errors import TrainingDivergedError
from nni_jackpot.experiment.comparators import COMPARATORS, OneShot
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.run import search

NAMES = [name for name, kind in COMPARATORS.items() if not issubclass(kind, OneShot)]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_exact_at_the_end(name: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"epochs": 2, "lr": 0.05}
    fields = COMPARATORS[name].__dataclass_fields__
    settings |= {"every": 1} if "every" in fields else {}
    file = write_file(tmp_path, comparators={name: settings}, finetune={"epochs": 0})
    rows = {row.kind: row for row in search(load_config(file)).rows}
    assert rows[name].sparsity == rows["initial"].sparsity
    assert 0 <= rows[name].accuracy <= 1


def test_a_nan_is_a_training_that_diverged(tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 1e30, "every": 1}
    file = write_file(tmp_path, comparators={"rigl": settings}, finetune={"epochs": 0})
    with pytest.raises(TrainingDivergedError, match="lower"):
        search(load_config(file))
