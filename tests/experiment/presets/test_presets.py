from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from torch import nn

from nni_jackpot import LotteryJackpotPruner, save_masks
from nni_jackpot.errors import ConfigListError, ExperimentConfigError
from nni_jackpot.experiment.config import dump_config, load_config
from nni_jackpot.experiment.models.resnet import ResNet
from nni_jackpot.experiment.presets import PRESETS, entries_of, register_preset
from nni_jackpot.masks import Masks, sparsity_of
from nni_jackpot.speedup.channels import shrink

RUN = {
    "output": "runs/x",
    "data": {"name": "digits"},
    "model": {},
    "pretrain": {"epochs": 1, "lr": 0.1},
    "search": {"epochs": 1},
}


def masks_of(name: str, model: nn.Module, sparsity: float | None) -> Masks:
    pruner = LotteryJackpotPruner(model, entries_of(name, model, sparsity))
    masks = pruner.get_masks()
    pruner.unwrap_model()
    return masks


def written(folder: Path, **sections: object) -> Path:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({**RUN, **sections}))
    return path


@pytest.mark.parametrize("name", ["weights", "mobile"])
def test_weights_without_the_classifier(name: str) -> None:
    masks = masks_of(name, ResNet(8, 4, 10, 1), 0.9)
    assert sparsity_of(masks) == pytest.approx(0.9, abs=1e-3)
    assert "fc" not in masks
    assert "conv1" in masks


def test_every_layer_of_a_mobilenet_keeps_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=4)
    with torch.no_grad():
        model.blocks[1][0].conv_dw.weight.mul_(1e-6)
    for preset in ("weights", "mobile"):
        masks = masks_of(preset, model, 0.9)
        assert sparsity_of(masks) == pytest.approx(0.9, abs=2e-3)
        kept = [mask.mean() for of in masks.values() for mask in of.values() if mask is not None]
        assert min(kept) > 0


def test_two_of_every_four_weights() -> None:
    masks = masks_of("2:4", ResNet(8, 4, 10, 1), None)
    assert "conv1" not in masks  # of one channel
    mask = masks["stage1.0.conv1"]["weight"]
    assert mask is not None
    assert torch.equal(mask.unflatten(1, (-1, 4)).sum(2), torch.full((4, 1, 3, 3), 2.0))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (lambda: ResNet(8, 4, 10, 1), (1, 8, 8)),
        (lambda: timm.create_model("resnet10t", num_classes=4), (3, 32, 32)),
    ],
)
def test_channels_can_be_taken_out(model: object, example: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    dense = model().eval()  # type: ignore[operator]
    masks = masks_of("channels", dense, 0.5)
    images = torch.randn(2, *example)
    small = shrink(dense, masks, images)
    before, after = (sum(p.numel() for p in each.parameters() if p.ndim == 4) for each in (dense, small))
    assert after < 0.8 * before


def test_channels_that_others_depend_on_are_refused_before_a_search() -> None:
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigListError, match="preset: channels finds nothing to prune in this network"):
        entries_of("channels", model, 0.5)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_preset_sets_what_suits_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, preset="channels", sparsity=0.5))
    assert (config.search.norm, config.search.recipe) == ("freeze", "paper")
    dump_config(config, tmp_path / "config.yml")
    assert load_config(tmp_path / "config.yml") == config
    path = written(tmp_path, preset="channels", sparsity=0.5, search={"epochs": 1, "norm": "adapt"})
    assert load_config(path).search.norm == "adapt"


def test_two_four_needs_no_quotes(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + "\npreset: 2:4\n")
    assert load_config(path).preset == "2:4"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {},
            "config_list: is missing, allowed: a list that is not empty (what to prune, and how much), or a pre",
        ),
        ({"sparsity": 0.5}, "config_list: is missing"),
        (
            {"preset": "channel", "sparsity": 0.5},
            "preset: found 'channel' (str), allowed: null or a string out of",
        ),
        (
            {"preset": "channels"},
            "sparsity: is missing, allowed beside preset channels: a number > 0 and < 1",
        ),
        ({"preset": "2:4", "sparsity": 0.9}, "sparsity: found 0.9, allowed: 0.5 or null for preset 2:4"),
        (
            {"preset": "weights", "sparsity": 1.0},
            "sparsity: found 1.0 (float), allowed: null or a number > 0 and",
        ),
        (
            {"preset": "weights", "sparsity": 0.5, "config_list": [{"op_types": ["Conv2d"]}]},
            "config_list: found a list, allowed: none beside preset, which is weights",
        ),
        (
            {"sparsity": 0.5, "config_list": [{"op_types": ["Conv2d"]}]},
            "sparsity: found 0.5, allowed: null without a preset",
        ),
    ],
)
def test_one_source_of_what_to_prune(tmp_path: Path, sections: dict[str, object], words: str) -> None:
    with pytest.raises(ExperimentConfigError) as caught:
        load_config(written(tmp_path, **sections))
    assert words in str(caught.value)


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    @register_preset("first_only")
    def first_only(model: nn.Module, sparsity: float) -> list[dict[str, object]]:
        """Prune the first convolution."""
        return [{"op_names": ["conv1"], "sparse_ratio": sparsity}]

    try:
        model = ResNet(8, 4, 10, 1)
        assert entries_of("first_only", model, 0.5) == [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
        save_masks(masks_of("first_only", model, 0.5), tmp_path / "masks.pth")
        assert load_config(written(tmp_path, preset="first_only", sparsity=0.5)).sparsity == 0.5
        with pytest.raises(ValueError, match="the name of a preset must match"):
            register_preset("no name")(first_only)
    finally:
        del PRESETS._objects["first_only"]
