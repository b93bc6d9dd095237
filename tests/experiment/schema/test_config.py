from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from minimal_run import MINIMAL, message, write

from nni_jackpot.errors import MissingLibraryError
from nni_jackpot.experiment.config import RunConfig, load_config
from nni_jackpot.experiment.data.section import DataConfig
from nni_jackpot.experiment.data.spec import DATASETS
from nni_jackpot.experiment.models.section import ModelConfig
from nni_jackpot.masking.methods.edge_popup import EdgePopup


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_defaults_are_filled_in(path: Path) -> None:
    config = load_config(path)
    assert (config.seed, config.output, config.device) == (0, "runs/x", "auto")
    assert config.data == DataConfig(name="digits", root=None, batch_size=64, eval_batch_size=512, workers=0)
    assert config.model == ModelConfig(name="resnet", depth=8, width=16)
    assert (config.pretrain.checkpoint, config.pretrain.cache) == (None, "runs/pretrained")
    assert (config.search.init, config.search.settings) == ("magnitude", EdgePopup())
    assert (config.search.settings.kept_score, config.search.settings.pruned_score) == (1.0, 0.95)
    assert (config.search.norm, config.search.reestimate_norm) == ("adapt", True)
    assert config.search.settings.swap_limit is None
    assert config.finetune.weight_decay == 5e-4


def test_config_list_is_kept_as_written(path: Path) -> None:
    assert list(load_config(path).config_list) == yaml.safe_load(MINIMAL)["config_list"]


def test_integer_is_a_number_and_becomes_one(path: Path) -> None:
    lr = load_config(path, {"search.lr": 1}).search.settings.lr
    assert lr == 1.0
    assert type(lr) is float


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_every_way_to_write_a_number(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, MINIMAL.replace("lr: 1e-2", f"lr: {text}").replace("0.9}", f"{text}}}"))
    config = load_config(path)
    assert config.finetune.lr == pytest.approx(1e-3)
    assert config.config_list[0]["sparse_ratio"] == pytest.approx(1e-3)


def test_merge_keys_and_anchors_are_no_duplicates(tmp_path: Path) -> None:
    text = MINIMAL.replace("pretrain: {", "pretrain: &train {").replace(
        "finetune: {epochs: 1, lr: 1e-2}", "finetune: {<<: *train, epochs: 7}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.finetune.epochs, config.finetune.lr) == (7, 0.1)


# -- errors of the file


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "none.yaml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert "not valid YAML" in message(path)


@pytest.mark.parametrize(
    "text", ["seed: [1", "a: b: c", "seed: 1\n---\nseed: 2", "x: !!python/name:os.system", "x: 2024-13-45"]
)
def test_yaml_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    assert "not valid YAML" in message(write(tmp_path, text))


def test_nesting_beyond_all_bounds(tmp_path: Path) -> None:
    assert "not valid YAML" in message(write(tmp_path, "[" * 5000))


@pytest.mark.parametrize("text", ["", "- seed", "seed"])
def test_no_mapping(tmp_path: Path, text: str) -> None:
    said = message(write(tmp_path, text))
    assert "a mapping with keys out of seed, output" in said


@pytest.mark.parametrize(
    ("text", "key"),
    [("seed: 1\nseed: 2" + MINIMAL, "seed"), (MINIMAL.replace("lr: 0.1", "epochs: 3"), "epochs")],
)
def test_duplicate_key(tmp_path: Path, text: str, key: str) -> None:
    said = message(write(tmp_path, text))
    assert f"'{key}' appears twice" in said
    assert "line" in said


# -- errors of keys and values


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("search.epoch", "epochs"),
        ("serch", "search"),
        ("model.depht", "depth"),
        ("pretrain.chekpoint", "checkpoint"),
    ],
)
def test_unknown_key(tmp_path: Path, key: str, close: str) -> None:
    raw = yaml.safe_load(MINIMAL)
    *parents, last = key.split(".")
    (raw[parents[0]] if parents else raw)[last] = 1
    said = message(write(tmp_path, yaml.dump(raw)))
    assert f"{key}: unknown key '{last}', allowed: " in said
    assert said.endswith(f"did you mean {close}?")


def test_unknown_key_that_resembles_nothing(tmp_path: Path) -> None:
    said = message(write(tmp_path, MINIMAL + "\n1: 2"))
    assert "1: unknown key 1, allowed: seed, output" in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    "key",
    [
        "output",
        "data",
        "data.name",
        "model",
        "pretrain",
        "pretrain.epochs",
        "pretrain.lr",
        "config_list",
        "search",
        "search.epochs",
        "finetune.lr",
    ],
)
def test_missing_key(tmp_path: Path, key: str) -> None:
    raw = yaml.safe_load(MINIMAL)
    *parents, last = key.split(".")
    del (raw[parents[0]] if parents else raw)[last]
    assert f": {key}: is missing, allowed: " in message(write(tmp_path, yaml.dump(raw)))


def test_sections_that_would_do_nothing_need_not_be_given(tmp_path: Path) -> None:
    raw = yaml.safe_load(MINIMAL)
    del raw["finetune"]
    raw["pretrain"] = {"checkpoint": "my.pth"}
    config = load_config(write(tmp_path, yaml.dump(raw)))
    assert config.compared == {}
    assert config.pretrain.epochs == 0
    raw["model"] = {"name": "torchvision/resnet18", "weights": "IMAGENET1K_V1"}
    del raw["pretrain"]
    assert load_config(write(tmp_path, yaml.dump(raw))).pretrain.epochs == 0


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("seed", -1, "an integer >= 0 and < 2**32"),
    ("seed", 2**32, "an integer >= 0 and < 2**32"),
    ("seed", True, "an integer"),
    ("seed", 1.5, "an integer"),
    ("seed", "1", "an integer"),
    ("seed", None, "an integer"),
    ("output", "", "a string that is not empty"),
    ("output", 3, "a string that is not empty"),
    ("device", "gpu", "a string out of auto, cpu, cuda, cuda:N"),
    ("device", "cuda:", "cuda:N"),
    ("data", None, "a mapping with keys out of name, root"),
    ("data", [], "a mapping with keys out of name, root"),
    ("data.name", "svhn", "out of digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, image_folder"),
    ("data.download", True, "false for digits, true for mnist, fashion_mnist, cifar10, cifar100"),
    ("data.image_size", 0, "null or an integer >= 1"),
    ("data.root", "", "null or a string that is not empty"),
    ("data.batch_size", 1, "an integer >= 2"),
    ("data.eval_batch_size", 0, "an integer >= 1"),
    ("data.augment", 1, "true or false"),
    ("data.augment", "yes", "true or false"),
    ("data.workers", -1, "an integer >= 0"),
    (
        "model.name",
        "vgg",
        "resnet, vgg19, torchvision/NAME, timm/NAME, transformers/FOLDER; did you mean vgg19?",
    ),
    ("model.name", "torchvision/resnet5", "did you mean torchvision/resnet50?"),
    ("model.name", "torchvision/fcn_resnet50", "torchvision/NAME"),
    ("model.weights", "IMAGENET1K_V1", "for resnet null"),
    ("model.depth", 9, "of the form 6n+2"),
    ("model.depth", 2, "of the form 6n+2"),
    ("model.width", 0, "an integer >= 1"),
    ("pretrain.epochs", -1, "an integer >= 0"),
    ("pretrain.lr", 0, "a number > 0"),
    ("pretrain.lr", "0.1", "a number > 0"),
    ("pretrain.lr", False, "a number > 0"),
    ("pretrain.checkpoint", 5, "null or a string"),
    ("pretrain.cache", None, "a string"),
    ("search.epochs", -1, "an integer >= 0"),
    ("search.init", "oracle", "a string out of magnitude, random, wanda, sparsegpt, snip"),
    ("search.lr", float("nan"), "null or a number >= 0"),
    ("search.lr", float("inf"), "null or a number >= 0"),
    ("search.lr", 10**400, "null or a number >= 0"),
    ("search.momentum", 1, "null or a number >= 0 and < 1"),
    ("search.weight_decay", -1e-9, "null or a number >= 0"),
    ("search.kept_score", "one", "a number"),
    ("model.init", "xavier", "null or a string out of kaiming, signed_constant"),
    ("search.method", "lottery", "a string out of edge_popup, patterns, supermask"),
    ("search.swap_limit", 0, "null or a number > 0 and <= 1"),
    ("search.swap_limit", 1.01, "null or a number > 0 and <= 1"),
    ("search.recipe", "soup", "a string out of default, paper"),
    ("search.ramp_end", 1.1, "null or a number >= 0 and <= 1"),
    ("search.anneal_end", -0.1, "null or a number >= 0 and <= 1"),
    ("finetune.under", "none", "a string out of initial, jackpot, both"),
    ("search.norm", None, "a string out of adapt, freeze"),
    ("search.reestimate_norm", 1, "null or true or false"),
    ("config_list", [], "a list that is not empty"),
    ("config_list", {"sparse_ratio": 0.5}, "a list that is not empty"),
    ("config_list", None, "a list that is not empty"),
    ("config_list.1", "Conv2d", "a mapping that is not empty, with string keys and plain values"),
    ("config_list.0", {}, "a mapping that is not empty"),
    ("config_list.0", {1: 2}, "with string keys"),
    ("config_list.0", {"a": {"b": {1: 2}}}, "with string keys"),
    ("config_list.0", {"a": float("nan")}, "plain values"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES)
@pytest.mark.parametrize("source", ["file", "override"])
def test_bad_value(tmp_path: Path, key: str, value: Any, allowed: str, source: str) -> None:
    if source == "override":
        said = message(write(tmp_path, MINIMAL), {key: value})
        assert said.endswith(f"(with the override {key})")
    else:
        raw = yaml.safe_load(MINIMAL)
        node = raw
        *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
        for part in parents:
            node = node[part]
        node[last] = value
        said = message(write(tmp_path, yaml.dump(raw)))
        assert "override" not in said
    assert f": {key}: found {repr(value)[:40]}" in said
    assert f"({type(value).__name__})" in said
    assert allowed in said.split("allowed: ", 1)[1]


@pytest.mark.parametrize("pruned", [1.0, 1.5])
def test_pruned_score_stays_below_kept_score(path: Path, pruned: float) -> None:
    said = message(path, {"search.pruned_score": pruned})
    assert f"search.pruned_score: found {pruned}, allowed: a number < kept_score, which is 1.0" in said


def test_long_value_is_cut_short(path: Path) -> None:
    assert len(message(path, {"device": "x" * 10_000})) < 400 + len(str(path))


@pytest.mark.parametrize("entry", ["{a: 2024-01-01}", "&a {self: *a}"])
def test_entry_with_values_that_are_not_plain(tmp_path: Path, entry: str) -> None:
    text = MINIMAL.replace("- {op_types: [Conv2d], sparse_ratio: 0.9}", f"- {entry}")
    assert "config_list.0: found" in message(write(tmp_path, text))


# -- the schema


def test_every_setting_says_what_it_is() -> None:
    def walk(cls: Any) -> None:
        for option in dataclasses.fields(cls):
            kind = get_type_hints(cls)[option.name]
            if dataclasses.is_dataclass(kind):
                walk(kind)
            else:
                assert "base" in option.metadata or option.metadata["doc"], option.name

    walk(RunConfig)


def test_datasets_are_those_of_the_registry() -> None:
    (option,) = (option for option in dataclasses.fields(DataConfig) if option.name == "name")
    rule = option.metadata["rule"]
    assert rule.allowed == "out of " + ", ".join(DATASETS)
    assert all(rule.holds(name) for name in DATASETS)


@pytest.mark.parametrize("name", ["imagenet", "image_folder"])
def test_folders_of_images_need_a_root(path: Path, name: str) -> None:
    said = message(path, {"data.name": name})
    assert f"data.root: found None (NoneType), allowed: the folder of {name}'s train and val" in said
    assert load_config(path, {"data.name": name, "data.root": "x"}).data.root == "x"


def test_weights_are_those_of_the_library(path: Path) -> None:
    said = message(path, {"model.name": "torchvision/resnet50", "model.weights": "V1"})
    assert "model.weights: found 'V1' (str), allowed: for torchvision/resnet50 null, IMAGENET1K_V1" in said
    chosen = {"model.name": "torchvision/resnet50", "model.weights": "IMAGENET1K_V1"}
    assert load_config(path, chosen).model.weights == "IMAGENET1K_V1"


def test_timm_is_wanted_only_for_its_networks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert load_config(path, {"model.name": "torchvision/resnet50"}).model.weights is None
    with pytest.raises(MissingLibraryError, match=r"nni-jackpot\[timm\]"):
        load_config(path, {"model.name": "timm/resnet50"})


def test_soft_masks_harden(path: Path) -> None:
    for where in ({"search.recipe": "paper"}, {"search.anneal_end": 0}):
        said = message(path, {"search.temperature": 0.5, **where})
        assert "search.temperature: found 0.5, allowed with anneal_end > 0" in said
    both = {"search.temperature": 0.5, "search.recipe": "paper", "search.anneal_end": 0.8}
    assert load_config(path, both).search.settings.temperature == 0.5
    assert (
        load_config(path, {"search.temperature": 0, "search.recipe": "paper"}).search.settings.anneal_end == 0
    )


def test_limited_swaps_go_with_masks_that_training_sees_whole(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    soft = {"search.recipe": "paper", "search.temperature": 0.5, "search.anneal_end": 0.5}
    for others in ({}, {"search.recipe": "paper", "search.ramp_end": 0.5}, soft):
        said = message(path, {"search.swap_limit": 0.1, **others})
        assert (
            "search.swap_limit: found 0.1, allowed with ramp_end 0, temperature 0 and reallocate false"
            in said
        )
    assert (
        load_config(path, {"search.swap_limit": 0.1, "search.recipe": "paper"}).search.settings.ramp_end == 0
    )


def test_random_weights_and_published_ones_exclude_each_other(path: Path) -> None:
    chosen = {"model.name": "torchvision/resnet18", "model.init": "kaiming"}
    assert load_config(path, chosen).model.init == "kaiming"
    said = message(path, {**chosen, "model.weights": "IMAGENET1K_V1"})
    assert "model.init: found 'kaiming' (str), allowed: null beside weights, which are IMAGENET1K_V1" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ramp_end", 0.5),
        ("temperature", 0.5),
        ("anneal_end", 0.5),
        ("swap_limit", 0.1),
        ("kept_score", 3.0),
        ("pruned_score", -3.0),
    ],
)
def test_a_supermask_has_settings_of_its_own(path: Path, name: str, value: float) -> None:
    chosen = {"search.method": "supermask", "search.recipe": "paper"}
    assert load_config(path, chosen).search.reestimate_norm
    assert not load_config(path, {"search.recipe": "paper"}).search.reestimate_norm
    said = message(path, {**chosen, f"search.{name}": value})
    assert f"search.{name}: unknown key '{name}', allowed: epochs, init, method, recipe" in said
