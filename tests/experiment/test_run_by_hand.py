"""What a run finds and says is what its parts give, put together by hand: on any processor, digit for digit."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import accuracy_of, data_of, pretrained, searched, statistics, statistics_anew, train
from conftest import model_of, same, same_state
from torch import nn

from nni_jackpot import EdgePopup, Supermask, apply_masks, load_masks
from nni_jackpot.experiment import run
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.folder.pretrained import cache_path, load_weights
from nni_jackpot.experiment.run import search
from nni_jackpot.experiment.running import image_task as images
from nni_jackpot.experiment.train import top_accuracies
from nni_jackpot.modules.batch_norm import reestimate

SEARCH_ONLY: dict[str, Any] = {"pretrain.epochs": 1, "finetune.epochs": 0}


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Copies of all models whose accuracy a run asks for, as they were then."""
    models: list[nn.Module] = []

    def look(model: nn.Module, *arguments: Any) -> list[float]:
        models.append(copy.deepcopy(model))
        return top_accuracies(model, *arguments)

    monkeypatch.setattr(images, "top_accuracies", look)
    return models


def test_pretraining_is_sgd_under_half_a_cosine(config: RunConfig) -> None:
    path, found = run.pretrain(config)
    torch.manual_seed(config.seed)
    model = model_of(config)
    train(model, config, config.pretrain)
    assert same_state(torch.load(path), model.state_dict())
    assert found == accuracy_of(model, config)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"method": "supermask"}, {"method": Supermask()}),
        ({"recipe": "paper", "lr": 1.0}, {"method": EdgePopup.paper(lr=1.0)}),
        (
            {"recipe": "paper", "lr": 1.0, "swap_limit": 1e-3},
            {"method": EdgePopup.paper(lr=1.0, swap_limit=1e-3)},
        ),
        ({"ramp_end": 1.0, "anneal_end": 0.5}, {"method": EdgePopup(ramp_end=1.0, anneal_end=0.5)}),
        ({"init": "random"}, {"init": "random"}),
    ],
    ids=["defaults", "supermask", "paper", "limited swaps", "another schedule", "random"],
)
def test_a_run_finds_what_the_pruner_finds(
    config_file: Path, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    config = load_config(
        config_file, {**SEARCH_ONLY, **{f"search.{name}": value for name, value in settings.items()}}
    )
    search(config)
    start, masks = (load_masks(tmp_path / "out" / name) for name in ("start.pth", "masks.pth"))
    assert same(masks, searched(config, **options))
    assert not same(masks, start)


def test_channels_last(config_file: Path, tmp_path: Path) -> None:
    plain = load_config(config_file, SEARCH_ONLY)
    config = load_config(config_file, {"model.channels_last": True, **SEARCH_ONLY})
    assert model_of(config).conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert cache_path(config) != cache_path(plain)
    search(config)
    masks = load_masks(tmp_path / "out" / "masks.pth")
    assert masks["conv1"]["weight"].is_contiguous()
    assert same(masks, searched(config))


def test_accuracies_are_those_of_what_is_on_disk(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, SEARCH_ONLY)
    dense, initial, initial_norm, jackpot = search(config).rows
    assert dense.accuracy == accuracy_of(pretrained(config), config)
    model = pretrained(config, load_masks(tmp_path / "out" / "start.pth"))
    assert initial.accuracy == accuracy_of(model, config)
    statistics_anew(model, config)
    assert initial_norm.accuracy == accuracy_of(model, config)
    load_weights(model, tmp_path / "out" / "jackpot.pth")
    assert jackpot.accuracy == accuracy_of(model, config)


def test_weights_are_tuned_under_either_mask(
    config_file: Path, tmp_path: Path, looked_at: list[nn.Module]
) -> None:
    both = {"pretrain.epochs": 1, "finetune.under": "both", "finetune.epochs": 2}
    config = load_config(config_file, both)
    rows = {row.kind: row for row in search(config).rows}
    assert list(rows)[3:] == ["jackpot", "initial_tuned", "jackpot_tuned"]
    assert (rows["initial_tuned"].epochs, rows["jackpot_tuned"].epochs) == (2, 4)
    out = tmp_path / "out"
    start, masks = (load_masks(out / name) for name in ("start.pth", "masks.pth"))
    jackpot = model_of(config)
    load_weights(jackpot, out / "jackpot.pth")
    # One starts from the dense network's weights and statistics, the other from the jackpot's.
    _, initial_tuned, _, _, jackpot_tuned = looked_at[-5:]
    for tuned, model, mask in (
        (initial_tuned, pretrained(config, start), start),
        (jackpot_tuned, jackpot, masks),
    ):
        train(model, config, config.finetune, mask)
        assert same_state(tuned.state_dict(), model.state_dict())
    assert rows["initial_tuned"].accuracy == accuracy_of(initial_tuned, config)
    assert rows["jackpot_tuned"].accuracy == accuracy_of(jackpot_tuned, config)
    only = search(load_config(config_file, {**both, "finetune.under": "jackpot"}), overwrite=True).rows
    assert [row.kind for row in only][3:] == ["jackpot", "jackpot_tuned"]
    assert only[-1] == rows["jackpot_tuned"]


def test_norm_statistics_can_be_held_and_estimated_anew(config_file: Path, tmp_path: Path) -> None:
    overrides = {"search.recipe": "paper", "search.lr": 1.0, "search.norm": "freeze", **SEARCH_ONLY}
    found = model_of(load_config(config_file))
    for anew in (False, True):
        config = load_config(config_file, {**overrides, "search.reestimate_norm": anew})
        search(config, overwrite=anew)
        expected = pretrained(config)
        held = statistics(expected)
        if anew:
            apply_masks(expected, load_masks(tmp_path / "out" / "masks.pth"))
            assert not same_state(held, statistics_anew(expected, config))
        load_weights(found, tmp_path / "out" / "jackpot.pth")
        assert same_state(statistics(found), statistics(expected))


def test_accuracies_in_the_midst_are_of_norm_statistics_that_fit(
    config_file: Path, tmp_path: Path, looked_at: list[nn.Module]
) -> None:
    for anew in (False, True):
        out = tmp_path / str(anew)
        overrides = {"search.epochs": 3, "search.reestimate_norm": anew, "output": str(out), **SEARCH_ONLY}
        config = load_config(config_file, overrides)
        looked_at.clear()
        search(config)
        in_the_midst = looked_at[-4:-1]  # an epoch each, before the jackpot itself
        with (out / "metrics.csv").open() as file:
            accuracies = [float(line["accuracy"]) for line in csv.DictReader(file)]
        for model, shown in zip(in_the_midst, accuracies, strict=True):
            assert shown == accuracy_of(model, config)
            seen = statistics(model)
            reestimate(model, data_of(config)[0].sample)
            assert same_state(seen, statistics(model)) == anew  # training has those of soft masks
    # The evaluation has not changed the search.
    assert same(*(load_masks(tmp_path / name / "masks.pth") for name in ("False", "True")))


def test_limited_swaps_stay_nearer_to_the_initial_mask(config_file: Path, tmp_path: Path) -> None:
    # At this rate all scores are new after a step, and half of the masks. A limit of less than one weight,
    # which is rounded up, lets one enter and one leave: at every one of the 46 steps, and at the end.
    options = {"search.recipe": "paper", "search.lr": 1e6, "search.swap_limit": 1e-9}
    options["search.weight_decay"] = 0.0
    search(load_config(config_file, {**options, **SEARCH_ONLY}))
    start, masks = (load_masks(tmp_path / "out" / name) for name in ("start.pth", "masks.pth"))
    changed = [int((start[name]["weight"] != masks[name]["weight"]).sum()) for name in masks]
    assert 0 < max(changed) <= 2 * 47
