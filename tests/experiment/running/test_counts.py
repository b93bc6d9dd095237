"""Counts of kept grains by the shapes of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import save_network, save_text, write_run

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.running.counts import ShapeCounts, do_shapes_decide
from nni_jackpot.experiment.running.targets import targets_in
from nni_jackpot.pruner import LotteryJackpotPruner

pytest.importorskip("transformers")

LINEAR: dict[str, Any] = {"op_types": ["Linear"], "exclude_op_names": ["pooler.dense"]}


def _run(tmp_path: Path, entry: dict[str, Any], **search: Any) -> tuple[RunConfig, torch.nn.Module]:
    save_text(tmp_path / "text.txt")
    network = save_network(tmp_path / "network", "BertModel")
    changes = {"config_list": [LINEAR | entry], "search": {"loss": "cosine", **search}}
    config = load_config(write_run(tmp_path, network, **changes))
    return config, load_language_model(config.model).network


@pytest.mark.parametrize("entry", [{"sparse_pattern": "2:4"}, {"sparse_ratio": 0.7}])
@pytest.mark.parametrize("budget", ["as_configured", "erdos_renyi_kernel"])
def test_equal_to_those_of_a_pruner(entry: dict[str, Any], budget: str, tmp_path: Path) -> None:
    config, model = _run(tmp_path, entry, budget=budget)
    assert do_shapes_decide(config, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = targets_in(config, model, [], lambda _, __: torch.zeros(()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    masks = LotteryJackpotPruner(model, [LINEAR | entry], budget=budget).get_masks()
    kept = {f"{m}.{n}": int(mask.sum()) for m, of in masks.items() for n, mask in of.items() if n == "weight"}
    assert {name: target.keep for name, target in found.items()} == kept


@pytest.mark.parametrize(
    ("entry", "budget"),
    [
        ({"sparse_ratio": 0.5, "global_group_id": 1}, "as_configured"),
        ({"sparse_ratio": 0.5, "granularity": "out_channel"}, "as_configured"),
        ({"sparse_ratio": 0.5}, "global_rank"),
    ],
)
def test_what_looks_at_values_is_left_to_a_pruner(entry: dict[str, Any], budget: str, tmp_path: Path) -> None:
    assert not do_shapes_decide(*_run(tmp_path, entry, budget=budget))


def test_a_wrong_ratio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JackpotError, match="sparse_ratio must lie in"):
        ShapeCounts(*_run(tmp_path, {"sparse_ratio": 1.0}))
