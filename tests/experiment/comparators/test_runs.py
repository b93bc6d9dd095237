"""Every comparator whose masks change runs from a YAML file, and ends with its exact number of zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_file
from torch import nn

from nni_jackpot.errors import ConfigListError, TrainingDivergedError
from nni_jackpot.experiment.comparators import COMPARATORS, Comparator, OneShot
from nni_jackpot.experiment.config import load_config
from nni_jackpot.experiment.run import search
from nni_jackpot.experiment.running import context
from nni_jackpot.masks import Masks, named_masks

NAMES = [name for name, kind in COMPARATORS.items() if not issubclass(kind, OneShot)]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_exact_at_the_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = context.train_weights
    runs: list[tuple[int, int]] = []

    def train_weights(model: nn.Module, config: Any, *args: Any, masks: Any = None, **kwargs: Any) -> Masks:
        start = None if masks is None else zeros(masks)
        end = trained(model, config, *args, masks=masks, **kwargs)
        if start is not None:
            runs.append((start, zeros(end)))
            weights = dict(model.named_parameters())
            assert all((weights[key][mask == 0] == 0).all() for key, mask in named_masks(end).items())
        return end

    monkeypatch.setattr(context, "train_weights", train_weights)
    every = {"every": 1} if "every" in COMPARATORS[name].__dataclass_fields__ else {}
    settings = {"epochs": 2, "lr": 0.05, **every}
    file = write_file(tmp_path, comparators={name: settings}, finetune={"epochs": 0, "under": "initial"})
    search(load_config(file))
    ((start, end),) = runs
    assert start == end > 0


@pytest.mark.parametrize("name", ["rigl", "lt", "snip"])
@pytest.mark.parametrize("entry", [{"granularity": "out_channel"}, {"sparse_pattern": "1:2"}])
def test_a_method_of_single_weights_is_refused_beside_others(
    name: str, entry: dict[str, Any], tmp_path: Path
) -> None:
    entry = {"op_types": ["Conv2d"], "exclude_op_names": ["conv1"], "sparse_ratio": 0.5, **entry}
    if "sparse_pattern" in entry:
        del entry["sparse_ratio"]
    settings = {"epochs": 1, "lr": 0.1}
    given = {"config_list": [entry], "finetune": {"epochs": 0, "under": "initial"}}
    file = write_file(tmp_path, comparators={name: settings}, **given)
    with pytest.raises(ConfigListError, match=rf"comparators\.{name}: .* prunes single weights"):
        search(load_config(file))
    assert not (tmp_path / "out").exists()
    fixed = {name: {**settings, "start": "initial"}} if name == "snip" else {}
    search(load_config(write_file(tmp_path, comparators=fixed, **given)))


def zeros(masks: Masks) -> int:
    """Return the number of zeros of all masks."""
    return sum(int((mask == 0).sum()) for mask in named_masks(masks).values())


def test_a_nan_is_a_training_that_diverged(tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 1e30, "every": 1}
    file = write_file(tmp_path, comparators={"rigl": settings}, finetune={"epochs": 0, "under": "initial"})
    with pytest.raises(TrainingDivergedError, match="lower"):
        search(load_config(file))


def test_a_name_belongs_to_one_comparator() -> None:
    with pytest.raises(ValueError, match="the comparator 'jackpot_tuned' is registered already"):
        COMPARATORS.register("jackpot_tuned")(Comparator)
